"""Memory-mapped flat files of token ids, and checks that their content fits their type."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saekit.errors import UserError

TYPES = {"uint16": "<u2", "uint32": "<u4", "int32": "<i4", "int64": "<i8"}
"""Types of the ids in a `.bin` file, by their names in `--data-args dtype=...`."""
UNSIGNED = {"uint16": "<u2", "uint32": "<u4", "int64": "<u8"}
"""The types that differ if no id is negative."""

CHUNK = 2**20
"""Ids that are checked at a time: a multiple of the number of narrowest ids per widest id."""
EVIDENT, DIFFERENT = 64, 8
"""How many ids must indicate a wider type before a file is refused, and how many of them must differ."""
NO_VOCABULARY = 2**22
"""No language model has this many tokens. Larger ids are several ids of a narrower type, read as one."""
HEAD = 2**16
"""Bytes at a file's start that are checked for other content."""
LEAST_TEXT, LEAST_LETTERS = 512, 12
"""The least number of bytes to recognize a file as text, and how many of them must differ."""
LLM_C, LLM_C_HEADER = (20240520, 20240801), 1024
"""First numbers, and size in bytes, of the header that llm.c writes before token ids."""


MISSING = np.iinfo(np.int64).min
"""Stands for a missing token id (null)."""


class Foreign(NamedTuple):
    """A token id that is not in a vocabulary."""

    token_id: int
    sequence: int
    offset: int
    """The token's position in its sequence. Both count from 0."""
    hint: str = ""
    """A likely reason, as the end of a sentence."""


class MemmapSequences:
    """A memory-mapped flat file of token ids, cut into sequences. Implements `Sequences`.

    Args:
        file: The file.
        dtype: One of `TYPES`.
        ctx_len: Tokens per sequence.
        check_type: Whether to refuse a file that clearly does not contain ids of this type.
        assumed: Whether `dtype` is the default rather than the user's choice.

    Raises:
        UserError: If the file cannot be read, contains something else, or has less than one sequence.
    """

    def __init__(self, file: Path, dtype: str, ctx_len: int, *, check_type: bool = True, assumed: bool = False) -> None:
        if dtype not in TYPES:
            raise UserError(f"--data-args dtype={dtype}: expected one of {', '.join(TYPES)}")
        self.file, self.dtype, self.ctx_len = file, dtype, ctx_len
        self.check_type, self.assumed = check_type, assumed
        try:
            size = file.stat().st_size
            other = other_content(file, size) if check_type else None
            self.bytes = np.memmap(file, dtype=np.uint8, mode="r") if size else np.empty(0, dtype=np.uint8)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror or error})") from None
        if other is not None:
            raise UserError(f"{file} contains {other}, not plain token ids")
        if size % np.dtype(TYPES[dtype]).itemsize:
            raise UserError(f"{file}: {size} bytes is not a whole number of {dtype} token ids{_whole_number_of(size)}")
        ids = self.bytes.view(TYPES[dtype])
        count = len(ids) // ctx_len
        if count == 0:
            raise UserError(f"{file} has less than one sequence of --ctx-len {ctx_len}: use a smaller --ctx-len")
        self.rows = ids[: count * ctx_len].reshape(count, ctx_len)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: np.ndarray) -> Tensor:
        """Return token ids, int64 `[B, ctx_len]`, of the sequences with these numbers."""
        return torch.from_numpy(self.rows[numbers].astype(np.int64))

    def check(self, vocabulary: int) -> None:
        """Check that the file does not clearly have ids of a wider type than `dtype`.

        This is fast for a file of the right type, because its first ids show it.

        Args:
            vocabulary: Number of tokens in the language model's vocabulary.

        Raises:
            UserError: If the file looks like a wider type, or if `dtype` was assumed and cannot hold all ids.
        """
        if self.assumed and vocabulary > 2**16:
            raise UserError(say_type(str(self.file), vocabulary))
        looks = wider_type(self.bytes, self.dtype, vocabulary) if self.check_type else None
        if looks is not None:
            raise UserError(
                f"{self.file} looks like {looks}, but is read as {self.dtype} (the upper parts of its ids, all "
                f"{'zero' if vocabulary <= 2**16 else 'small'}, would be separate ids). Use --data-args "
                f"dtype={looks}, or dtype={self.dtype},check_type=false if it really is {self.dtype}"
            )

    def first_foreign(self, vocabulary: int, numbers: np.ndarray) -> Foreign | None:
        """Find the first token id, in the file's order, that is not in a vocabulary of this size.

        Args:
            vocabulary: Number of tokens in the language model's vocabulary.
            numbers: The sequences to check, ascending.
        """
        if np.iinfo(self.rows.dtype).min == 0 and np.iinfo(self.rows.dtype).max < vocabulary:
            return None
        step = max(1, CHUNK // self.ctx_len)
        for start in range(0, len(numbers), step):
            some = numbers[start : start + step]
            together = some[-1] - some[0] == len(some) - 1  # a slice of the file needs no copy
            rows = self.rows[some[0] : some[-1] + 1] if together else self.rows[some]
            if _within(rows, vocabulary):
                continue
            sequence, offset = np.argwhere((rows < 0) | (rows >= vocabulary))[0]
            looks = narrower_type(self.bytes, self.dtype, vocabulary)
            hint = f", and the file looks like {looks}: use --data-args dtype={looks}" if looks else ""
            return Foreign(int(rows[sequence, offset]), int(some[sequence]), int(offset), hint)
        return None


def say_type(name: str, vocabulary: int) -> str:
    """Return the message for a file without a given type, if the vocabulary is too large for the default type."""
    return (
        f"data set {name!r}: the vocabulary has {vocabulary:,} tokens, so the type of the file's ids is unclear. Set "
        "--data-args dtype=uint32 (or uint16)"
    )


def wider_type(content: np.ndarray, dtype: str, vocabulary: int) -> str | None:
    """Return the wider type that a file clearly has, if any.

    If an id of a wider type is read as several ids of a narrower type, its upper parts become ids: zeros, or numbers up
    to `vocabulary / 2**16`. So if every group of ids in the file, read as one wide id, is in the vocabulary, all ids
    but the first of each group are this small. That proves nothing if the first ids are small too, as in padding. The
    file has the wider type if at least `EVIDENT` groups, `DIFFERENT` of them distinct, begin with a larger id.

    Args:
        content: The file, uint8.
        dtype: The type as which it is read.
        vocabulary: Number of tokens in the language model's vocabulary.
    """
    width = np.dtype(TYPES[dtype]).itemsize
    for name, code in reversed(UNSIGNED.items()):
        wide = np.dtype(code)
        if wide.itemsize <= width:
            continue
        small, lower = (vocabulary - 1) >> (8 * width), (1 << (8 * width)) - 1
        found, different = 0, np.empty(0, dtype=wide)
        for ids in _chunks(content, wide):
            if not _within(ids, vocabulary):
                break
            larger = ids[(ids & wide.type(lower)) > small]
            found += len(larger)
            if len(different) < DIFFERENT:
                different = np.unique(np.concatenate([different, larger]))
        else:
            if found >= EVIDENT and len(different) >= DIFFERENT:
                return name
    return None


def narrower_type(content: np.ndarray, dtype: str, vocabulary: int) -> str | None:
    """Return the narrower type that a file with ids outside the vocabulary looks like, if any.

    Args:
        content: The file, uint8.
        dtype: The type as which it is read, and has ids outside the vocabulary.
        vocabulary: Number of tokens in the language model's vocabulary.
    """
    said = np.dtype(TYPES[dtype])
    for name, code in reversed(UNSIGNED.items()):
        narrow = np.dtype(code)
        if narrow.itemsize < said.itemsize and all(_within(ids, vocabulary) for ids in _chunks(content, narrow)):
            # If every number of the narrow type is in the vocabulary, the ids may also be those of another model.
            shows_nothing = np.iinfo(narrow).max < vocabulary
            foreign = shows_nothing and all(_within(ids, NO_VOCABULARY) for ids in _chunks(content, said))
            return None if foreign else name
    return None


def other_content(file: Path, size: int) -> str | None:
    """Describe what a file contains if it is clearly not token ids, and otherwise return None.

    The checks are strict enough that token ids do not pass them by chance.

    Raises:
        OSError: If the file cannot be read.
    """
    with file.open("rb") as stream:
        head = stream.read(HEAD)
        stream.seek(max(0, size - 4))
        tail = stream.read(4)
    if head.startswith(b"\x93NUMPY"):
        return "a NumPy array with a header (write it with `array.tofile`)"
    if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(file):
        return "a zip archive, as torch.save and numpy.savez write"
    if head.startswith(b"PAR1") and tail == b"PAR1":
        return "a parquet file (name it .parquet)"
    if head.startswith(b"\x28\xb5\x2f\xfd") or _is_gzip(head):
        return "compressed data (unpack it, since it is mapped into memory)"
    if _has_llm_c_header(head, size):
        return f"a header of {LLM_C_HEADER} bytes, as llm.c writes (cut it off: tail -c +{LLM_C_HEADER + 1})"
    return "text (name it .txt or .jsonl)" if _is_text(head) else None


def _is_gzip(head: bytes) -> bool:
    if not head.startswith(b"\x1f\x8b\x08"):
        return False
    try:
        return len(zlib.decompressobj(wbits=31).decompress(head)) >= LEAST_TEXT
    except zlib.error:
        return False


def _has_llm_c_header(head: bytes, size: int) -> bool:
    """Return whether a file begins with llm.c's header: a magic number and, third, the number of ids that follow."""
    if len(head) < LLM_C_HEADER:
        return False
    numbers = np.frombuffer(head[:12], dtype="<i4")
    return int(numbers[0]) in LLM_C and int(numbers[2]) in ((size - LLM_C_HEADER) // 2, (size - LLM_C_HEADER) // 4)


def _is_text(head: bytes) -> bool:
    """Return whether bytes are UTF-8 text and not so by chance: many different ones, with spaces or line breaks."""
    if len(head) < LEAST_TEXT or len(set(head)) < LEAST_LETTERS or not set(head) & set(b" \n"):
        return False
    try:
        text = head[:-4].decode()  # the last character may be cut off
    except UnicodeDecodeError as error:
        if error.start < len(head) - 8:
            return False
        text = head[: error.start].decode()
    return not any(letter < " " and letter not in "\t\n\r\f" for letter in text)


def _whole_number_of(size: int) -> str:
    """Return the types of which a file of this size holds a whole number, as the end of a sentence."""
    fitting = [name for name, code in reversed(UNSIGNED.items()) if size % np.dtype(code).itemsize == 0]
    if not fitting:
        return ": it is cut off, or not a file of token ids"
    return f", but of {' or '.join(fitting)}: use --data-args dtype={fitting[0]}"


def _chunks(content: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield bytes as ids of a type, a chunk at a time, without an incomplete id at the end."""
    whole = content[: len(content) // dtype.itemsize * dtype.itemsize].view(dtype)
    for start in range(0, len(whole), CHUNK):
        yield whole[start : start + CHUNK]


def _within(ids: np.ndarray, vocabulary: int) -> bool:
    """Return whether all ids are in a vocabulary of this size."""
    return ids.size == 0 or (int(ids.max()) < vocabulary and int(ids.min()) >= 0)
