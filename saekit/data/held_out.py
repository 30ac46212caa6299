"""The documents of a data set that a run did not read."""

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
"""Advice for a run that has read everything."""


def shuffled(data: Sequences, max_tokens: int, seed: int = 0) -> Sequences:
    """As many sequences as `max_tokens` has room for, at least one, from everywhere in the data."""
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
    """Find what a run does not read of its own data set.

    Of text, or rows of any lengths, those documents none of whose tokens were in a sequence that the run trained on,
    packed again. A file of token ids, and rows of `ctx_len` tokens each, do not tell where documents begin: of them it
    is the sequences that were not trained on.

    Arguments and errors are those of `unread`; `cfg` is the run's.
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
    """Find what a run does not read of its own data set, or of another split of it.

    Args:
        cfg: The data set as it is to be evaluated on: the run's own, or another split.
        trained: The data set as the run reads it.
        tokenizer: The language model's; None if it has none, for data that is tokenized already.
        ctx_len: Tokens per sequence.
        seen: Numbers of the sequences that the run trains on, as `load_sequences` counts those of `trained`.
        token: For a private or gated data set on the hub.
        remedy: What to do if nothing is left.

    Raises:
        UserError: If nothing is left, or less than one sequence.
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
    """Another split of a run's data set, without documents that the run was trained on.

    Splits overlap where one is a slice of the other (`train[:50%]` and `train`), and some data sets hold a document
    more than once. Documents are the same whose token ids are (by a hash of 64 bits).

    Arguments and errors are those of `unread`.
    """
    if cfg.dataset.endswith(".bin"):  # has no splits
        return held_out(trained, tokenizer, ctx_len, seen, token, remedy)
    rows, own = _tokenized(cfg, tokenizer, token), _tokenized(trained, tokenizer, token)
    read = fingerprints(own)[_read(own, ctx_len, seen)]
    return _some(rows, ~np.isin(fingerprints(rows), read), ctx_len, cfg, remedy)


def _tokenized(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase | None, token: str | None) -> Dataset:
    """One row of `input_ids` per document, or as the data set has them."""
    rows = load_rows(cfg, token)
    if cfg.max_examples is not None:
        rows = rows.select(range(min(cfg.max_examples, len(rows))))
    if "input_ids" in rows.column_names:
        return rows
    return tokenize(rows, needed(tokenizer), text_key=cfg.text_column, num_proc=cfg.num_proc)


def _read(rows: Dataset, ctx_len: int, seen: np.ndarray) -> np.ndarray:
    """Tell which rows have a token in one of the sequences `seen`; bool, one per row."""
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
    """Tell which documents have a token in one of the sequences `seen`.

    Args:
        lengths: Tokens of each document, its separator included, int64.
        ctx_len: Tokens per sequence; the documents, one after the other, are cut into sequences of this length.
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
    """Token ids of each row, int64; read from Arrow's offsets, not from the tokens."""
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
        f"of {cfg.dataset!r} (--split {cfg.split}) the run left unread {what}: what it was trained on would not be "
        f"held out. {remedy}"
    )
