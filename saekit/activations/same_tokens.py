"""Check that token ids mean the same to two language models, by comparing their tokenizers."""

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
    """Check that token ids mean the same to two models.

    Compares the regular vocabularies, and how the tokenizers turn text into ids. An added token (of a chat template,
    for example) may be missing in one tokenizer. If both have it, its id must be the same.

    Args:
        tokenizers: The first and the second model's tokenizers. None for a model without one.
        sizes: The number of tokens in each model's vocabulary. Compared instead if a tokenizer is missing.
        other_name: The second model's name.
        say: Called with a line of text if tokenizers could not be compared.

    Raises:
        UserError: If they differ.
    """
    one, other = tokenizers
    option = f"--crosscode-models {other_name}"
    if one is None or other is None:
        whose = "either model" if one is other else "the first model" if one is None else other_name
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{option}: there is no tokenizer of {whose} to compare, and the vocabularies differ in size: "
                f"{sizes[0]:,} and {sizes[1]:,} tokens. Both models must read the same token ids"
            )
        say(f"There is no tokenizer of {whose}, so saekit cannot check that token ids mean the same to both models")
        return
    if (difference := difference_of(one, other)) is not None:
        raise UserError(f"{option}: its tokenizer differs from the first model's: {difference}")


def difference_of(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """Return a difference between two tokenizers that changes ids. None if there is none."""
    ids, other_ids = (each.get_vocab() for each in (one, other))
    added = {**one.get_added_vocab(), **other.get_added_vocab()}  # also special tokens in the regular vocabulary
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
        return f"they {did} text differently" if did else f"they tokenize differently ({differing[0]})"
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
    """Return what else decides ids: the stages of a fast tokenizer, or the class of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"class": type(tokenizer).__name__}
    written = json.loads(backend.to_str())
    model = {name: value for name, value in written["model"].items() if name != "vocab"}
    if isinstance(written["model"]["vocab"], list):  # Unigram: includes the scores by which it chooses tokens
        model["scores"] = written["model"]["vocab"]
    return {**{name: written[name] for name in STAGES}, **model}
