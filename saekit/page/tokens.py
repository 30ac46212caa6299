"""Tokens as a reader knows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LETTER = "\ufffd"
"""What decoding puts for bytes that are no whole letter."""


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token as it stands inside a text, with the space before it if it brings one.

    Decoded alone, a token of SentencePiece's loses that space, and a WordPiece looks like a word of its own; so each is
    decoded behind another. Tokens that are a part of a letter only are shown as the vocabulary has them.
    """
    (before,) = tokenizer.encode("a", add_special_tokens=False)[-1:] or [0]

    def decode(some: list[int]) -> str:
        return tokenizer.decode(some, clean_up_tokenization_spaces=False)

    start = decode([before])
    texts = []
    for token, raw in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        text = decode([before, token])
        whole = text.startswith(start) and NO_LETTER not in text
        texts.append(text[len(start) :] if whole else str(raw))
    return texts
