"""Find token ids outside a language model's vocabulary before training or evaluating on them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from saekit.data.batches import Chosen, DatasetSequences, Sequences
from saekit.data.token_files import MISSING, MemmapSequences
from saekit.errors import UserError

_CHECKED: WeakKeyDictionary[Sequences, tuple[int, np.ndarray]] = WeakKeyDictionary()
"""The vocabulary and the sequences for which data passed the check."""


def check_tokens(
    data: Sequences, vocabulary: int, numbers: np.ndarray | None = None, what: str = "the data set"
) -> None:
    """Check that all token ids that will be read are in a model's vocabulary. A repeated check costs nothing.

    A file is read through its memory map, and a data set as Arrow stores it. For a caller's own kind of `Sequences`,
    every batch is checked when it is read instead.

    Args:
        data: The sequences.
        vocabulary: Number of tokens in the language model's vocabulary.
        numbers: The sequences that will be read. By default all.
        what: The name of the data in messages.

    Raises:
        UserError: If an id is not in the vocabulary, or if a file clearly has another type.
    """
    numbers = np.arange(len(data)) if numbers is None else np.sort(numbers)
    while isinstance(data, Chosen):
        numbers = np.sort(data.numbers[numbers])
        data = data.whole
    if not isinstance(data, (DatasetSequences, MemmapSequences)):
        return
    known, looked_at = _CHECKED.get(data, (0, numbers))
    if known == vocabulary and np.array_equal(looked_at, numbers):
        return
    if isinstance(data, MemmapSequences):
        data.check(vocabulary)
    found = data.first_foreign(vocabulary, numbers)
    if found is not None:
        named = "a token without an id" if found.token_id == MISSING else f"token id {found.token_id:,}"
        raise UserError(
            f"{what} has {named} at token {found.offset:,} of sequence {found.sequence:,} (both counted from 0), but "
            f"the model's vocabulary has {vocabulary:,} tokens: it was tokenized for another model{found.hint}"
        )
    _CHECKED[data] = (vocabulary, numbers)
