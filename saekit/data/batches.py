"""The batch of optimizer step *s*, as a function of *s*, the seed and the global batch size alone; read ahead."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from saekit.data.token_files import CHUNK, MISSING, Foreign
from saekit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from saekit.config import TrainConfig


TOKENIZED = "one datasets.Dataset with a column input_ids, such as saekit.chunk_and_tokenize makes"


class Sequences(Protocol):
    """Token sequences of one length, by number."""

    ctx_len: int
    """Tokens per sequence."""

    def __len__(self) -> int:
        """Return the number of sequences."""

    def read(self, numbers: np.ndarray) -> Tensor:
        """Token ids `[len(numbers), ctx_len]`, int64, on the CPU."""


class DatasetSequences:
    """Rows of a data set with a column `input_ids` of one length."""

    def __init__(self, data: Dataset, ctx_len: int) -> None:
        self.data = data.select_columns(["input_ids"]).with_format("numpy")
        self.ctx_len = ctx_len

    def __len__(self) -> int:
        return len(self.data)

    def read(self, numbers: np.ndarray) -> Tensor:
        """Return token ids, int64 `[B, ctx_len]`, of the sequences with these numbers."""
        if len(numbers) == 0:
            return torch.empty(0, self.ctx_len, dtype=torch.int64)
        rows = np.asarray(self.data[numbers.tolist()]["input_ids"])
        return torch.from_numpy(rows.astype(np.int64))

    def first_foreign(self, vocabulary: int, numbers: np.ndarray) -> Foreign | None:
        """Find the first token id, in the data set's order, that a vocabulary of this size does not have.

        Args:
            vocabulary: Number of tokens that the language model knows.
            numbers: The sequences to look at, ascending.
        """
        import pyarrow.compute as pc

        rows = self.data.with_format("arrow")
        if len(numbers) < len(rows):
            rows = rows.select(numbers)
        done = 0
        for batch in rows.iter(batch_size=max(1, CHUNK // self.ctx_len)):
            ids = pc.list_flatten(batch.column("input_ids"))
            limits = pc.min_max(ids).as_py()
            if ids.null_count or limits["min"] < 0 or limits["max"] >= vocabulary:
                flat = pc.fill_null(ids.cast("int64", safe=False), MISSING).to_numpy()
                place = int(np.flatnonzero((flat < 0) | (flat >= vocabulary))[0])
                sequence, offset = divmod(place, self.ctx_len)
                return Foreign(int(flat[place]), int(numbers[done + sequence]), offset)
            done += len(batch)
        return None


class Chosen:
    """Some of other sequences, in an order of their own. Implements `Sequences`."""

    def __init__(self, whole: Sequences, numbers: np.ndarray) -> None:
        self.whole = whole
        self.numbers = numbers
        self.ctx_len = whole.ctx_len

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, numbers: np.ndarray) -> Tensor:
        """Return token ids, int64 `[B, ctx_len]`, of the sequences with these numbers."""
        return self.whole.read(self.numbers[numbers]) if len(numbers) else torch.empty(0, self.ctx_len).long()


def sequences(data: Any, ctx_len: int | None = None) -> Sequences:
    """Make `Sequences` of a tokenized data set; rows of other lengths than `ctx_len` are joined and cut again.

    Args:
        data: A `datasets.Dataset` with a column `input_ids`, or `Sequences` already.
        ctx_len: Tokens per sequence; by default the length of the first row.

    Raises:
        UserError: If there is no such column, it holds something else, or there is less than one sequence.
    """
    if not hasattr(data, "column_names"):
        if not hasattr(data, "ctx_len") or not hasattr(data, "read"):
            raise UserError(f"the data set is a {type(data).__name__}, not {TOKENIZED}")
        return data
    if not isinstance(data.column_names, list) or not hasattr(data, "__len__"):
        raise UserError(f"the data set is a {type(data).__name__}, not {TOKENIZED}")
    if "input_ids" not in data.column_names:
        raise UserError(
            f"the data set is not tokenized: it has no column input_ids but {', '.join(data.column_names)}; "
            "saekit.chunk_and_tokenize makes one"
        )
    if len(data) == 0:
        raise UserError("the data set is empty")
    column = data.features["input_ids"]
    kind = getattr(getattr(column, "feature", column), "dtype", "lists of lists")
    if not hasattr(column, "feature") or "int" not in kind:
        raise UserError(f"the column input_ids holds {kind}, not lists of token ids")
    if "attention_mask" in data.column_names and _has_padding(data):
        raise UserError(
            "the data set has padded rows (zeros in attention_mask): give rows without padding; they may differ in "
            "length, and are joined and cut"
        )
    from saekit.data.pack import pack

    length = ctx_len or len(data.with_format(None)[0]["input_ids"])
    return DatasetSequences(data if _all_of_length(data, length) else pack(data, length), length)


def _all_of_length(data: Dataset, length: int) -> bool:
    """Tell whether every row has `length` tokens, by Arrow's offsets, not by the tokens."""
    import pyarrow.compute as pc

    for batch in data.with_format("arrow").select_columns(["input_ids"]).iter(batch_size=10_000):
        lengths = pc.list_value_length(batch.column("input_ids"))
        if pc.any(pc.fill_null(pc.not_equal(lengths, length), True)).as_py():
            return False
    return True


def _has_padding(data: Dataset) -> bool:
    """Tell whether any token is masked out."""
    import pyarrow.compute as pc

    for batch in data.with_format("arrow").select_columns(["attention_mask"]).iter(batch_size=10_000):
        if pc.any(pc.equal(pc.list_flatten(batch.column("attention_mask")), 0)).as_py():
            return True
    return False


class StepBatches:
    """Cuts a seeded order of all sequences into optimizer steps, and a step into ranks and micro-batches.

    Args:
        data: The sequences.
        global_batch: Sequences per optimizer step over all ranks.
        seed: Seed of the order; None keeps the data set's own.
        max_tokens: Stop after this many tokens, excluded ones included.

    Raises:
        UserError: If there is less than one global batch.
    """

    def __init__(self, data: Sequences, global_batch: int, seed: int | None, max_tokens: int | None = None) -> None:
        count = len(data)
        if max_tokens is not None:
            count = min(count, max_tokens // data.ctx_len)
        if count < global_batch:
            limit = "" if max_tokens is None else f" (--max-tokens {max_tokens})"
            raise UserError(
                f"there are {count} sequences of {data.ctx_len} tokens{limit}, fewer than one optimizer step of "
                f"{global_batch}: give more text, or a smaller --batch-size, --grad-acc-steps or --ctx-len"
            )
        self.data = data
        self.global_batch = global_batch
        order = np.arange(len(data)) if seed is None else np.random.default_rng(seed).permutation(len(data))
        self.order = order[:count]

    @property
    def num_sequences(self) -> int:
        """Return the number of sequences that a run reads."""
        return len(self.order)

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps in a run; the last may have fewer sequences than the others."""
        return -(-len(self.order) // self.global_batch)

    def checksum(self, step: int) -> str:
        """Return a checksum of the token ids of optimizer step `step`, over all ranks."""
        numbers = self.order[step * self.global_batch : (step + 1) * self.global_batch]
        return xxhash.xxh3_128_hexdigest(self.data.read(numbers).numpy().tobytes())

    def step(self, step: int, rank: int, world_size: int, micro_batches: int) -> Iterator[Tensor]:
        """Yield this rank's micro-batches of token ids `[B, T]` of optimizer step `step`, which counts from 0."""
        for places in self.shares(step, rank, world_size, micro_batches):
            yield self.data.read(self.order[places.start : places.stop])

    def shares(self, step: int, rank: int, world_size: int, micro_batches: int) -> Iterator[range]:
        """Yield which places in the run's order this rank's micro-batches of a step have.

        The step's sequences are dealt out in equal contiguous slices, first to micro-batches, then to ranks, so their
        union does not depend on either number; in the last step of a run slices can be short or empty.
        """
        size = self.global_batch // (world_size * micro_batches)
        for micro in range(micro_batches):
            start = step * self.global_batch + (micro * world_size + rank) * size
            yield range(min(start, self.num_sequences), min(start + size, self.num_sequences))


def numbers_read(cfg: TrainConfig, data: Sequences) -> np.ndarray:
    """Return the numbers of the sequences that a run reads, in its order; none twice."""
    return StepBatches(data, 1, cfg.data_seed if cfg.shuffle else None, cfg.max_tokens).order


def read_ahead(read: Callable[[int], list[Tensor]], start: int, stop: int) -> Generator[tuple[int, list[Tensor]]]:
    """Yield each step's number, from `start` up to but not including `stop`, with its batches; a thread reads ahead.

    What a step reads depends on its number alone, so reading early changes nothing. An error in `read` is raised when
    its step comes. Close the iterator (or use it up) to end its thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokens") as worker:
        coming = worker.submit(read, start) if start < stop else None
        for step in range(start, stop):
            assert coming is not None, "submitted in the round before"
            batches = coming.result()
            if step + 1 < stop:
                coming = worker.submit(read, step + 1)
            yield step, batches
