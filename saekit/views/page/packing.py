"""Arrays and tokens as text for a page's script to unpack: `store.js` does the inverse."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUND_TO = 12
"""Bits of a float's mantissa that are kept: numbers are shown with three digits, and the rest would not compress."""


def pack_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Arrays of any shape as base64 of gzip.

    Inside: the header's length in bytes (uint32, little-endian), the header (JSON: of each array its name, type, shape
    and number of bytes), and the arrays, each as planes: the first byte of every element, then the second of every
    element, and so on, which compresses better. Integers take the smallest type that holds them, floats are float32.
    """
    header, planes = [], []
    for name, array in arrays.items():
        small = np.ascontiguousarray(smallest(array))
        shuffled = small.reshape(-1).view(np.uint8).reshape(-1, small.itemsize).T.tobytes()
        header.append({"name": name, "type": small.dtype.name, "shape": list(small.shape), "bytes": len(shuffled)})
        planes.append(shuffled)
    head = json.dumps(header).encode()
    whole = len(head).to_bytes(4, "little") + head + b"".join(planes)
    return base64.b64encode(gzip.compress(whole, mtime=0)).decode()


def smallest(array: np.ndarray) -> np.ndarray:
    """Return integers in the smallest type that holds them, and floats as float32 with `ROUND_TO` bits.

    Raises:
        ValueError: If integers need more than 32 bits.
    """
    if array.dtype.kind == "f":
        return _rounded(array.astype("<f4"))
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for kind in ("u1", "<u2", "<i4"):
        limits = np.iinfo(kind)
        if limits.min <= low and high <= limits.max:
            return array.astype(kind)
    raise ValueError(f"no type for integers from {low} to {high}")


def _rounded(floats: np.ndarray) -> np.ndarray:
    """To `ROUND_TO` bits after the first, to nearest; NaN and infinity stay what they are."""
    dropped = 23 - ROUND_TO
    bits = floats.view("<u4")
    rounded = ((bits.astype(np.uint64) + (1 << (dropped - 1))) >> dropped << dropped).astype("<u4").view("<f4")
    return np.where(np.isfinite(floats) & np.isfinite(rounded), rounded, floats)


NO_LETTER = "\ufffd"
"""The replacement character for bytes that are no complete letter."""


def token_texts(tokenizer: PreTrainedTokenizerBase | None, ids: list[int]) -> list[str]:
    """Return the text of each token as it stands inside a text, with the space before it if it brings one.

    Without a tokenizer it is the token's id, in brackets.

    Decoded alone, a token of SentencePiece's loses that space, and a WordPiece looks like a word of its own; so each is
    decoded behind another. Tokens that are a part of a letter only are shown as the vocabulary has them.
    """
    if tokenizer is None:
        return [f"[{token}]" for token in ids]
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
