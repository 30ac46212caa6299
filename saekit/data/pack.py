"""Tokenize documents, and pack them into sequences of exactly `ctx_len` token ids without gaps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from saekit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEXT_TYPES = ("string", "large_string", "null")
"""Types of a text column. A column without any text has type null."""

DOCUMENTS_PER_PROCESS = 2000
"""The least number of documents per process. For fewer, starting a process costs more than it saves."""


def chunk_and_tokenize(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_key: str = "text",
    max_seq_len: int | None = None,
    num_proc: int | None = None,
    load_from_cache_file: bool = True,
) -> Dataset:
    """Tokenize documents and pack them, one after the other, into sequences of one length.

    The stream is `EOS doc EOS doc EOS ...`, with an end-of-text token before every document, including the first. It is
    cut into sequences without gaps, also across the batches of `map`. Only the rest at the end of the data set, less
    than one sequence, is dropped. `datasets` caches both stages.

    Args:
        data: Rows with text.
        tokenizer: A loaded tokenizer. Its EOS token, or an encoder's separator, goes between documents.
        text_key: The column with the text.
        max_seq_len: Tokens per sequence. By default 2048, or the tokenizer's limit if that is less.
        num_proc: Number of processes that tokenize. By default one per core, if there are enough documents.
        load_from_cache_file: Whether to use a cached result.

    Returns:
        A data set in torch format with one column, `input_ids`, of `max_seq_len` token ids per row.

    Raises:
        UserError: If there is no such column, no token to put between documents, no row, or less text than one
            sequence, or if an argument has the wrong type.
    """
    _check_arguments(data, tokenizer, max_seq_len=max_seq_len, num_proc=num_proc)
    ctx_len = max_seq_len or min(2048, tokenizer.model_max_length)
    tokens = tokenize(data, tokenizer, text_key=text_key, num_proc=num_proc, load_from_cache_file=load_from_cache_file)
    return pack(tokens, ctx_len, load_from_cache_file=load_from_cache_file)


def _check_arguments(data: Any, tokenizer: Any, **numbers: int | None) -> None:
    if not isinstance(getattr(data, "column_names", None), list) or not hasattr(data, "__len__"):
        raise UserError(
            f"the data set is a {type(data).__name__}: pass a datasets.Dataset (of several splits, one of them)"
        )
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise UserError(f"the tokenizer is a {type(tokenizer).__name__}: pass a loaded tokenizer of transformers")
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}: expected at least 1")


def tokenize(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_key: str = "text",
    num_proc: int | None = None,
    load_from_cache_file: bool = True,
) -> Dataset:
    """Tokenize documents into one row each, with a separator first. See `chunk_and_tokenize` for the arguments.

    Raises:
        UserError: If there is no such column, no token to put between documents, or no row.
    """
    if text_key not in data.column_names:
        raise UserError(
            f"--text-column {text_key!r}: there is no such column; the data set has {', '.join(data.column_names)}"
        )
    if len(data) == 0:
        raise UserError("the data set is empty: it has no row")
    kind = getattr(data.features[text_key], "dtype", "")
    if kind not in TEXT_TYPES:
        raise UserError(
            f"--text-column {text_key!r} contains {kind or 'no single values'}, not text; "
            f"the data set has {', '.join(data.column_names)}"
        )
    separator = separator_id(tokenizer)
    wanted = num_proc or os.cpu_count() or 1
    processes = max(1, min(wanted, len(data) // DOCUMENTS_PER_PROCESS))

    with _one_kind_of_parallelism(processes):
        return data.map(
            _tokenize,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer, "text_key": text_key, "separator": separator},
            num_proc=processes if processes > 1 else None,
            remove_columns=data.column_names,
            load_from_cache_file=load_from_cache_file,
            desc="Tokenizing",
        )


def pack(tokens: Dataset, ctx_len: int, *, load_from_cache_file: bool = True) -> Dataset:
    """Join rows of `input_ids` of any lengths into one stream, and cut it into rows of `ctx_len` tokens.

    Raises:
        UserError: If all rows together are shorter than one sequence.
    """
    packed = (
        tokens.select_columns(["input_ids"])
        .with_format("arrow")
        .map(
            _Packer(ctx_len),
            batched=True,
            load_from_cache_file=load_from_cache_file,
            desc=f"Packing into chunks of {ctx_len}",
        )
    )
    if len(packed) == 0:
        have = sum(len(row) for row in tokens.with_format(None)["input_ids"])
        raise UserError(
            f"the data set has {have} tokens, less than one sequence of --ctx-len {ctx_len}: "
            "use more text or a smaller --ctx-len"
        )
    return packed.with_format("torch")


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that goes before each document: EOS, or an encoder's separator.

    Raises:
        UserError: If the tokenizer has no such token.
    """
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError(
        "the tokenizer has no EOS, SEP or BOS token to put between documents: tokenize the data set yourself and pass "
        "it with a column input_ids"
    )


def _tokenize(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, text_key: str, separator: int
) -> dict[str, Any]:
    # A module-level function with plain arguments, so that its hash, the key of the cache, is the same in every
    # process.
    texts = [text or "" for text in batch[text_key]]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {"input_ids": [np.asarray([separator, *ids], dtype=np.int32) for ids in encoded["input_ids"]]}


class _Packer:
    """Cuts batches of token rows into sequences, and carries the rest over to the next batch.

    `map` calls it in one process and in order. It is always new when `map` hashes it, so the key of the cache does not
    depend on carried tokens.
    """

    def __init__(self, ctx_len: int) -> None:
        self.ctx_len = ctx_len
        self.carried = np.empty(0, dtype=np.int32)

    def __call__(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        column = table.column("input_ids").combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
        stream = np.concatenate([self.carried, values])
        whole = len(stream) // self.ctx_len * self.ctx_len
        self.carried = stream[whole:].copy()
        offsets = np.arange(0, whole + 1, self.ctx_len, dtype=np.int32)
        return pa.table({"input_ids": pa.ListArray.from_arrays(offsets, stream[:whole])})


@contextmanager
def _one_kind_of_parallelism(processes: int) -> Iterator[None]:
    """Use either the tokenizer's own threads or several processes: forking a process with such threads can hang."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true" if processes == 1 else "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
