"""Whether token ids mean the same to two language models, by what decides ids in their tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from saekit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGES = {"normalizer": "normalize", "pre_tokenizer": "split"}
"""Stages of a tokenizer before its model, and what they do to text."""


def check_same_tokens(
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None],
    sizes: tuple[int, int],
    other_name: str,
    say: Callable[[str], None],
) -> None:
    """Check that the ids of one tokenizer mean the same to the model of another.

    Compared are the regular vocabulary and how text becomes a sequence of it. Tokens that were added to one of them (a
    chat template's, for example) may be missing in the other; where both have one, its id must be the same.

    Args:
        tokenizers: Of the first model and of the second; None for a model without.
        sizes: Tokens in the models' vocabularies, by which they are compared if one has no tokenizer.
        other_name: The second model's.
        say: Told if tokenizers could not be compared.

    Raises:
        UserError: If they differ.
    """
    one, other = tokenizers
    option = f"--crosscode-models {other_name}"
    if one is None or other is None:
        whose = "either model" if one is other else "the first model" if one is None else other_name
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{option}: there is no tokenizer of {whose} to compare, and the vocabularies differ: {sizes[0]:,} and "
                f"{sizes[1]:,} tokens; both models must read the same token ids"
            )
        say(f"There is no tokenizer of {whose}: whether token ids mean the same to both models is not checked")
        return
    if (difference := difference_of(one, other)) is not None:
        raise UserError(f"{option}: its tokenizer is another than the first model's: {difference}")


def difference_of(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Say in what two tokenizers differ, as far as it changes ids; None if it changes none."""
    ids, other_ids = (each.get_vocab() for each in (one, other))
    added = {**one.get_added_vocab(), **other.get_added_vocab()}  # to the vocabulary, or marked in it as special
    regular, other_regular = ({text: each[text] for text in each if text not in added} for each in (ids, other_ids))
    if regular != other_regular:
        return _first_difference(regular, other_regular)
    for text in added:
        if text in ids and text in other_ids and ids[text] != other_ids[text]:
            return f"the token {text!r} is {ids[text]} in the first and {other_ids[text]} in the second"
    parts, other_parts = _parts(one), _parts(other)
    differing = [name for name in parts if parts[name] != other_parts.get(name)]
    if differing:
        did = STAGES.get(differing[0])
        return f"they {did} text differently" if did else f"they make tokens differently ({differing[0]})"
    return None


def _first_difference(one: dict[str, int], other: dict[str, int]) -> str:
    numbers = {**other, **one}
    text = min((each for each in numbers if one.get(each) != other.get(each)), key=lambda each: (numbers[each], each))
    known = [each.get(text, "unknown") for each in (one, other)]
    return (
        f"of {len(one):,} and {len(other):,} regular tokens, {text!r} is {known[0]} in the first and {known[1]} in the "
        "second"
    )


def _parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what else decides ids: of the tokenizers library all stages, of Python's the class."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"class": type(tokenizer).__name__}
    written = json.loads(backend.to_str())
    model = {name: value for name, value in written["model"].items() if name != "vocab"}
    if isinstance(written["model"]["vocab"], list):  # with the scores by which Unigram chooses
        model["scores"] = written["model"]["vocab"]
    return {**{name: written[name] for name in STAGES}, **model}
