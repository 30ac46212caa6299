"""Documents to chunks of exactly `ctx_len` token ids, with nothing lost in between."""

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
"""Types of a column with text; null is one without any."""

DOCUMENTS_PER_PROCESS = 2000
"""Documents below which another process costs more to start than it saves."""


def chunk_and_tokenize(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_key: str = "text",
    max_seq_len: int | None = None,
    num_proc: int | None = None,
    load_from_cache_file: bool = True,
) -> Dataset:
    """Tokenize documents and pack them, one after the other, into chunks of one length.

    The stream is `EOS doc EOS doc EOS ...`: an end-of-text token before every document, the first included. It is cut
    into chunks without a gap, across the borders of `map`'s batches too; only what is left at the very end of the
    data set, less than one chunk, is dropped. Both stages are cached by `datasets`.

    Args:
        data: Rows with text.
        tokenizer: Its EOS token (for an encoder without one, its separator) is put between documents.
        text_key: The column with the text.
        max_seq_len: Tokens per chunk; by default 2048, or the tokenizer's limit if that is less.
        num_proc: Processes that tokenize; by default one per core, as far as there are documents for them.
        load_from_cache_file: Whether a cached result may be used.

    Returns:
        A data set of one column, `input_ids`, each row `max_seq_len` token ids, in torch format.

    Raises:
        UserError: If there is no such column, no token to put between documents, no row, or less text than one chunk,
            or if an argument is of another kind.
    """
    _check_arguments(data, tokenizer, max_seq_len=max_seq_len, num_proc=num_proc)
    ctx_len = max_seq_len or min(2048, tokenizer.model_max_length)
    tokens = tokenize(data, tokenizer, text_key=text_key, num_proc=num_proc, load_from_cache_file=load_from_cache_file)
    return pack(tokens, ctx_len, load_from_cache_file=load_from_cache_file)


def _check_arguments(data: Any, tokenizer: Any, **numbers: int | None) -> None:
    if not isinstance(getattr(data, "column_names", None), list) or not hasattr(data, "__len__"):
        raise UserError(
            f"the data set is a {type(data).__name__}: give one datasets.Dataset (of several splits, one of them)"
        )
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise UserError(f"the tokenizer is a {type(tokenizer).__name__}: give one of transformers that is loaded")
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
    """Tokenize documents, each behind a separator, one row per document; the arguments are `chunk_and_tokenize`'s.

    Raises:
        UserError: If there is no such column, no token to put between documents, or no row.
    """
    if text_key not in data.column_names:
        raise UserError(
            f"--text-column {text_key!r}: the data set has no such column; it has {', '.join(data.column_names)}"
        )
    if len(data) == 0:
        raise UserError("the data set is empty: it has no row")
    kind = getattr(data.features[text_key], "dtype", "")
    if kind not in TEXT_TYPES:
        raise UserError(
            f"--text-column {text_key!r} holds {kind or 'no single values'}, not text; "
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
    """Join the rows of `input_ids`, of any lengths, into one stream and cut it into rows of `ctx_len`.

    Raises:
        UserError: If all rows together are shorter than one chunk.
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
            "give more text or a smaller --ctx-len"
        )
    return packed.with_format("torch")


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands before each document: EOS, or an encoder's separator."""
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return int(token_id)
    raise UserError(
        "the tokenizer has no EOS, SEP or BOS token to put between documents: tokenize the data set yourself and give "
        "it with a column input_ids"
    )


def _tokenize(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, text_key: str, separator: int
) -> dict[str, Any]:
    # A module-level function of plain arguments, so that its hash, the cache's key, is the same in every process.
    texts = [text or "" for text in batch[text_key]]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return {"input_ids": [np.asarray([separator, *ids], dtype=np.int32) for ids in encoded["input_ids"]]}


class _Packer:
    """Cuts batches of token rows into chunks and carries what is left over into the next batch.

    It is mapped in one process, in order; a fresh one has nothing carried, so the cache's key does not depend on use.
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
    """Either the tokenizer's own threads or several processes: forking a process that has such threads can hang."""
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
