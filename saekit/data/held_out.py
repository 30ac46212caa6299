"""The documents of a data set that a run did not train on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from saekit.config import DataConfig
from saekit.data.batches import Chosen, Sequences, sequences
from saekit.data.load import load_rows, load_sequences, needed
from saekit.data.pack import pack, tokenize
from saekit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


OTHER_DATA = "Name another data set or --split to evaluate on, or train with --max-tokens"
"""Advice if a run has read everything."""


def shuffled(data: Sequences, max_tokens: int, seed: int = 0) -> Sequences:
    """Draw a random sample of sequences, up to `max_tokens` tokens but at least one sequence."""
    order = np.random.default_rng(seed).permutation(len(data))
    return Chosen(data, order[: max(1, max_tokens // data.ctx_len)])


def held_out(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    ctx_len: int,
    seen: np.ndarray,
    token: str | None = None,
    remedy: str = OTHER_DATA,
) -> Sequences:
    """Return the part of a run's data set that the run does not train on.

    For text, or rows of varying lengths, this is every document with no token in a sequence that the run trains on,
    packed again. A file of token ids, or rows of exactly `ctx_len` tokens, do not show where documents begin. For these
    it is the sequences that the run does not train on.

    Arguments and errors are those of `unread`. `cfg` is the run's configuration.
    """
    if cfg.dataset.endswith(".bin"):
        whole = load_sequences(cfg, tokenizer, ctx_len, token)
        return _chosen(whole, np.setdiff1d(np.arange(len(whole)), seen), cfg, remedy)
    rows = _tokenized(cfg, tokenizer, token)
    return _some(rows, ~_read(rows, ctx_len, seen), ctx_len, cfg, remedy)


def unread(
    cfg: DataConfig,
    trained: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    ctx_len: int,
    seen: np.ndarray,
    token: str | None = None,
    remedy: str = OTHER_DATA,
) -> Sequences:
    """Return the part of a run's data set, or of another split of it, that the run does not train on.

    Args:
        cfg: The data set to evaluate on: the run's own, or another split of it.
        trained: The data set that the run trains on.
        tokenizer: The language model's tokenizer. None if it has none; the data must then be tokenized.
        ctx_len: Tokens per sequence.
        seen: Numbers of the sequences that the run trains on, in the order of `load_sequences` for `trained`.
        token: An access token, for a private or gated data set on the hub.
        remedy: The advice in the error message if nothing is left.

    Raises:
        UserError: If less than one sequence is left.
    """
    if cfg.split == trained.split:
        return held_out(trained, tokenizer, ctx_len, seen, token, remedy)
    return other_split(cfg, trained, tokenizer, ctx_len, seen, token, remedy)


def other_split(
    cfg: DataConfig,
    trained: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    ctx_len: int,
    seen: np.ndarray,
    token: str | None = None,
    remedy: str = OTHER_DATA,
) -> Sequences:
    """Return another split of a run's data set, without documents that the run was trained on.

    Splits overlap if one is a slice of the other (`train[:50%]` and `train`), and some data sets contain a document
    more than once. Two documents are the same if their token ids have the same 64-bit hash.

    Arguments and errors are those of `unread`.
    """
    if cfg.dataset.endswith(".bin"):  # has no splits
        return held_out(trained, tokenizer, ctx_len, seen, token, remedy)
    rows, own = _tokenized(cfg, tokenizer, token), _tokenized(trained, tokenizer, token)
    read = fingerprints(own)[_read(own, ctx_len, seen)]
    return _some(rows, ~np.isin(fingerprints(rows), read), ctx_len, cfg, remedy)


def _tokenized(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase | None, token: str | None) -> Dataset:
    """Return one row of `input_ids` per document, or the data set's own rows if it is tokenized."""
    rows = load_rows(cfg, token)
    if cfg.max_examples is not None:
        rows = rows.select(range(min(cfg.max_examples, len(rows))))
    if "input_ids" in rows.column_names:
        return rows
    return tokenize(rows, needed(tokenizer), text_key=cfg.text_column, num_proc=cfg.num_proc)


def _read(rows: Dataset, ctx_len: int, seen: np.ndarray) -> np.ndarray:
    """Return which rows have a token in one of the sequences `seen`: bool, one per row."""
    lengths = row_lengths(rows)
    if not (lengths == ctx_len).all():
        return touched(lengths, ctx_len, seen)
    is_seen = np.zeros(len(rows), dtype=bool)
    is_seen[seen] = True
    return is_seen


def _some(rows: Dataset, wanted: np.ndarray, ctx_len: int, cfg: DataConfig, remedy: str) -> Sequences:
    lengths, numbers = row_lengths(rows), np.flatnonzero(wanted)
    if (lengths == ctx_len).all():
        return _chosen(sequences(rows, ctx_len), numbers, cfg, remedy)
    if lengths[numbers].sum() < ctx_len:
        left = f"{len(numbers)} of its {len(rows)} documents, less than one sequence of {ctx_len}"
        raise _nothing_left(cfg, left, remedy)
    return sequences(pack(rows.select(numbers), ctx_len), ctx_len)


def _chosen(whole: Sequences, numbers: np.ndarray, cfg: DataConfig, remedy: str) -> Sequences:
    if len(numbers) == 0:
        raise _nothing_left(cfg, "no sequence", remedy)
    return Chosen(whole, numbers)


def touched(lengths: np.ndarray, ctx_len: int, seen: np.ndarray) -> np.ndarray:
    """Return which documents have a token in one of the sequences `seen`.

    Args:
        lengths: Number of tokens of each document, including its separator, int64.
        ctx_len: Tokens per sequence. The concatenated documents are cut into sequences of this length.
        seen: Numbers of sequences.

    Returns:
        bool, one per document.
    """
    ends = lengths.cumsum()
    first, last = (ends - lengths) // ctx_len, np.maximum(ends - 1, 0) // ctx_len
    is_seen = np.zeros(int(last[-1]) + 1 if len(last) else 0, dtype=np.int64)
    is_seen[seen[seen < len(is_seen)]] = 1
    before = np.concatenate([[0], is_seen.cumsum()])
    return (before[last + 1] > before[first]) & (lengths > 0)


def row_lengths(rows: Dataset) -> np.ndarray:
    """Return the number of token ids in each row, int64. Reads Arrow's offsets, not the tokens."""
    import pyarrow.compute as pc

    parts = [
        pc.fill_null(pc.list_value_length(batch.column("input_ids")), 0).to_numpy()
        for batch in rows.with_format("arrow").select_columns(["input_ids"]).iter(batch_size=10_000)
    ]
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)


def fingerprints(rows: Dataset) -> np.ndarray:
    """Return a hash of each row's token ids, uint64."""
    import xxhash

    found = []
    for batch in rows.with_format("arrow").select_columns(["input_ids"]).iter(batch_size=10_000):
        for ids in batch.column("input_ids"):
            values = np.empty(0) if ids.values is None else ids.values.to_numpy(zero_copy_only=False)
            found.append(xxhash.xxh3_64_intdigest(values.astype(np.int32).tobytes()))
    return np.array(found, dtype=np.uint64)


def _nothing_left(cfg: DataConfig, what: str, remedy: str) -> UserError:
    return UserError(
        f"data set {cfg.dataset!r} (--split {cfg.split}): the run left {what} unread, so too little is held out. "
        f"{remedy}"
    )
