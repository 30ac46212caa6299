"""The batch of optimizer step *s*, which depends only on *s*, the seed and the global batch size, and reading ahead."""

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


TOKENIZED = "a datasets.Dataset with a column input_ids, such as saekit.chunk_and_tokenize returns"


class Sequences(Protocol):
    """Token sequences of one length, numbered from 0."""

    ctx_len: int
    """Tokens per sequence."""

    def __len__(self) -> int:
        """Return the number of sequences."""

    def read(self, numbers: np.ndarray) -> Tensor:
        """Return token ids `[len(numbers), ctx_len]`, int64, on the CPU."""


class DatasetSequences:
    """Rows of a data set whose column `input_ids` has one length. Implements `Sequences`."""

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
        """Find the first token id, in the data set's order, that is not in a vocabulary of this size.

        Args:
            vocabulary: Number of tokens in the language model's vocabulary.
            numbers: The sequences to check, ascending.
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
    """A selection of other sequences, in a given order. Implements `Sequences`."""

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
    """Make `Sequences` of a tokenized data set. If rows differ from `ctx_len` in length, join and cut them again.

    Args:
        data: A `datasets.Dataset` with a column `input_ids`, or `Sequences`, which are returned unchanged.
        ctx_len: Tokens per sequence. By default the length of the first row.

    Raises:
        UserError: If there is no such column, if it does not contain lists of token ids, if rows are padded, or if
            there is less than one sequence.
    """
    if not hasattr(data, "column_names"):
        if not hasattr(data, "ctx_len") or not hasattr(data, "read"):
            raise UserError(f"the data set is a {type(data).__name__}: pass {TOKENIZED}")
        return data
    if not isinstance(data.column_names, list) or not hasattr(data, "__len__"):
        raise UserError(f"the data set is a {type(data).__name__}: pass {TOKENIZED}")
    if "input_ids" not in data.column_names:
        raise UserError(
            f"the data set is not tokenized: it has the columns {', '.join(data.column_names)}, but no input_ids. "
            "Tokenize it with saekit.chunk_and_tokenize"
        )
    if len(data) == 0:
        raise UserError("the data set is empty: it has no row")
    column = data.features["input_ids"]
    kind = getattr(getattr(column, "feature", column), "dtype", "lists of lists")
    if not hasattr(column, "feature") or "int" not in kind:
        raise UserError(f"the column input_ids contains {kind}, not lists of token ids")
    if "attention_mask" in data.column_names and _has_padding(data):
        raise UserError(
            "the data set has padded rows (zeros in attention_mask): pass rows without padding. They may differ in "
            "length, since saekit joins and cuts them"
        )
    from saekit.data.pack import pack

    length = ctx_len or len(data.with_format(None)[0]["input_ids"])
    return DatasetSequences(data if _all_of_length(data, length) else pack(data, length), length)


def _all_of_length(data: Dataset, length: int) -> bool:
    """Return whether every row has `length` tokens. Reads Arrow's offsets, not the tokens."""
    import pyarrow.compute as pc

    for batch in data.with_format("arrow").select_columns(["input_ids"]).iter(batch_size=10_000):
        lengths = pc.list_value_length(batch.column("input_ids"))
        if pc.any(pc.fill_null(pc.not_equal(lengths, length), True)).as_py():
            return False
    return True


def _has_padding(data: Dataset) -> bool:
    """Return whether the attention mask of any token is zero."""
    import pyarrow.compute as pc

    for batch in data.with_format("arrow").select_columns(["attention_mask"]).iter(batch_size=10_000):
        if pc.any(pc.equal(pc.list_flatten(batch.column("attention_mask")), 0)).as_py():
            return True
    return False


class StepBatches:
    """Splits a seeded order of all sequences into optimizer steps, and each step into ranks and micro-batches.

    Args:
        data: The sequences.
        global_batch: Sequences per optimizer step over all ranks.
        seed: Seed of the order. None keeps the data set's order.
        max_tokens: Stop after this many tokens, including excluded ones.

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
                f"{global_batch}: use more text, or a smaller --batch-size, --grad-acc-steps or --ctx-len"
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
        """Return the number of optimizer steps in a run. The last step may have fewer sequences than the others."""
        return -(-len(self.order) // self.global_batch)

    def checksum(self, step: int) -> str:
        """Return a checksum of the token ids of optimizer step `step`, over all ranks."""
        numbers = self.order[step * self.global_batch : (step + 1) * self.global_batch]
        return xxhash.xxh3_128_hexdigest(self.data.read(numbers).numpy().tobytes())

    def step(self, step: int, rank: int, world_size: int, micro_batches: int) -> Iterator[Tensor]:
        """Yield this rank's micro-batches of token ids `[B, T]` of optimizer step `step`, counted from 0."""
        for places in self.shares(step, rank, world_size, micro_batches):
            yield self.data.read(self.order[places.start : places.stop])

    def shares(self, step: int, rank: int, world_size: int, micro_batches: int) -> Iterator[range]:
        """Yield the positions of this rank's micro-batches of a step in the run's order.

        The step's sequences are split into equal contiguous slices, first over micro-batches, then over ranks, so their
        union does not depend on either number. In a run's last step, slices can be short or empty.
        """
        size = self.global_batch // (world_size * micro_batches)
        for micro in range(micro_batches):
            start = step * self.global_batch + (micro * world_size + rank) * size
            yield range(min(start, self.num_sequences), min(start + size, self.num_sequences))


def numbers_read(cfg: TrainConfig, data: Sequences) -> np.ndarray:
    """Return the numbers of the sequences that a run reads, in its order, without repeats."""
    return StepBatches(data, 1, cfg.order_seed, cfg.max_tokens).order


def read_ahead(read: Callable[[int], list[Tensor]], start: int, stop: int) -> Generator[tuple[int, list[Tensor]]]:
    """Yield the number and the batches of each step, from `start` to `stop - 1`, while a thread reads one step ahead.

    A step's batches depend only on its number, so reading them early changes nothing. An error in `read` is raised when
    its step is reached. Close or exhaust the iterator to end its thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokens") as worker:
        coming = worker.submit(read, start) if start < stop else None
        for step in range(start, stop):
            assert coming is not None, "submitted in the previous iteration"
            batches = coming.result()
            if step + 1 < stop:
                coming = worker.submit(read, step + 1)
            yield step, batches
