"""Mixing (`--mix STEPS`): the tokens of one optimizer step come from STEPS times as many sequences.

The language model reads the sequences of STEPS optimizer steps, a block, before the first of them. Every step of the
block then trains on a share of the tokens of *every* sequence in it. The shares are drawn with the run's seed, sequence
by sequence, so no tokens travel between ranks, and a step has the same tokens on any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from saekit.activations.held import Held, hold
from saekit.activations.source import Activations, Batch, Source, Tokens
from saekit.config import TrainConfig

if TYPE_CHECKING:
    from saekit.activations.live import LiveModel

MixIn = Literal["auto", "device", "host", "disk"]


@dataclass(frozen=True)
class Micro:
    """What a rank's micro-batch of one step contributes to its block."""

    batch: Batch
    order_N: Tensor
    """int64 `[N]`: the rows of its activations, sorted by the step of the block that trains on them."""
    bounds: tuple[int, ...]
    """Where in that order the rows of each step begin, and N."""
    counted_N: Tensor | None
    """bool `[N]`, in that order: which rows are counted; None for all."""

    def share(self, part: int) -> slice:
        """Return where the rows of one step are in the order."""
        return slice(self.bounds[part], self.bounds[part + 1])

    def count(self, part: int) -> int:
        """Count the counted rows of one step."""
        share = self.share(part)
        return share.stop - share.start if self.counted_N is None else int(self.counted_N[share].sum())


@dataclass(frozen=True)
class Block:
    """The sequences of some steps in a row: `micros[i][m]` is micro-batch m of the block's step i."""

    number: int
    micros: tuple[tuple[Micro, ...], ...]


class Share(NamedTuple):
    """A micro-batch of one step of a block: that share of the tokens in `block.micros[i][micro]` of every i."""

    block: Block
    part: int
    """The step, counted from the block's first."""
    micro: int


class Mixed(Source):
    """Mixes the tokens of several optimizer steps of another source.

    Args:
        source: Whose activations; it tells which token each row belongs to (`Source.tokens`).
        steps: Optimizer steps of a block; the last block of a run can have fewer.
        where: Where the activations of a block are kept until their step; `auto` takes what has room, the fastest
            first.
        folder: A folder on a disk, for activations that are kept there.
    """

    def __init__(self, source: Source, steps: int, where: MixIn, folder: Path) -> None:
        self.source = source
        self._steps, self._where, self._folder = steps, where, folder
        self._read: Block | None = None
        self._held: Held | None = None
        self._begun: tuple[Share, Activations] | None = None

    def begin(self, cfg: TrainConfig, device: torch.device, rank: int, world_size: int) -> None:
        """Resolve what depends on the run; see `Source.begin`.

        Raises:
            UserError: As the source.
        """
        source = self.source
        source.begin(cfg, device, rank, world_size)
        self.name, self.other_name, self.data_name = source.name, source.other_name, source.data_name
        self.dtype, self.excluded = source.dtype, source.excluded
        self.hookpoints, self.sites = source.hookpoints, source.sites
        self.ctx_len, self.global_batch, self.num_sequences = source.ctx_len, source.global_batch, source.num_sequences
        self._device, self._seed = device, cfg.data_seed
        self._rows_per_step = cfg.batch_size * cfg.grad_acc_steps * self.ctx_len

    @property
    def language_model(self) -> LiveModel | None:  # type: ignore[override]
        """Return the source's."""
        return self.source.language_model

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open the source; the block's memory, or file, is given back at the end."""
        with self.source.open():
            try:
                yield
            finally:
                self.forget()
                if self._held is not None:
                    self._held.close()
                self._held = self._read = None

    def read(self, step: int) -> list[Share]:
        """Read the tokens of the step's block, unless they were read for the step before."""
        number, part = divmod(step, self._steps)
        if self._read is None or self._read.number != number:
            self._read = self._read_block(number)
        block = self._read
        return [Share(block, part, micro) for micro in range(len(block.micros[0]))]

    def _read_block(self, number: int) -> Block:
        first = number * self._steps
        steps = range(first, min(first + self._steps, self.num_steps))
        sizes = [min(self.global_batch, self.num_sequences - step * self.global_batch) for step in steps]
        read = [self.source.read(step) for step in steps]
        return Block(number, tuple(tuple(self._micro(batch, sizes) for batch in batches) for batches in read))

    def _micro(self, batch: Batch, sizes: Sequence[int]) -> Micro:
        tokens: Tokens = self.source.tokens(batch)
        steps_BT = shares(tokens.places, self.ctx_len, sizes, self._seed)
        of_rows = steps_BT[tokens.rows]
        counts = torch.bincount(of_rows, minlength=len(sizes)).tolist()
        order_N = of_rows.argsort(stable=True)
        counted_N = None if tokens.counted is None else tokens.counted[tokens.rows][order_N]
        return Micro(batch, order_N, (0, *accumulate(counts)), counted_N)

    def checksum(self, step: int) -> str:
        """Return a checksum of the block's data, and of which share of it the step has."""
        first = step - step % self._steps
        block = [self.source.checksum(each) for each in range(first, min(first + self._steps, self.num_steps))]
        return xxhash.xxh3_128_hexdigest(f"{block} {self._seed} {step - first}".encode())

    def count(self, batch: Share) -> int:
        """Count the tokens of a micro-batch."""
        return sum(each.count(batch.part) for each in _column(batch))

    def __call__(self, batch: Share) -> Activations:
        """Give a micro-batch's activations; the block's first call runs the source on all of the block."""
        if self._begun is not None and self._begun[0] is batch:
            acts, self._begun = self._begun[1], None
            return acts
        self.forget()
        if self._held is None or self._held.block is not batch.block:
            self._fill(batch.block)
        return self._take(batch)

    @property
    def runs_behind(self) -> bool:
        """Tell what the source does."""
        return self.source.runs_behind

    def prefetch(self, batch: Share) -> None:
        """Copy the next step's activations, if they are there; the next block's have no room before this one ends."""
        if self._held is not None and self._held.block is batch.block:
            self._begun = (batch, self._take(batch))

    def forget(self) -> None:
        """Drop the copy."""
        self._begun = None

    @cached_property
    def _capacity(self) -> int:
        """Return the most rows that a block has."""
        return self._rows_per_step * min(self._steps, self.num_steps)

    def _fill(self, block: Block) -> None:
        """Run the source on the whole block. The rows of a micro-batch are sorted by their step as they are copied."""
        if self._held is not None:
            self._held.block = None  # it is being overwritten
        start = 0
        for micro in (each for micros in block.micros for each in micros):
            acts = self.source(micro.batch)
            if self._held is None:
                dtypes = {name: each.dtype for name, each in acts.of.items()}
                self._held = hold(self._where, self.hookpoints, dtypes, self._capacity, self._device, self._folder)
            order_N = micro.order_N.to(self._device)
            for name in list(acts.of):
                self._held.put(name, start, acts.of.pop(name), order_N)
            start += len(order_N)
        assert self._held is not None, "a block has a step"
        self._held.finish()
        self._held.block = block

    def _take(self, batch: Share) -> Activations:
        """Put a micro-batch's activations together."""
        assert self._held is not None, "filled"
        spans, start = [], 0
        for micros in batch.block.micros:
            for number, micro in enumerate(micros):
                share = micro.share(batch.part)
                if number == batch.micro:
                    spans.append(slice(start + share.start, start + share.stop))
                start += len(micro.order_N)
        counted = [each.counted_N[each.share(batch.part)] for each in _column(batch) if each.counted_N is not None]
        of = {each.name: self._held.take(each.name, spans) for each in self.hookpoints}
        return Activations(of, torch.cat(counted).to(self._device) if counted else None)


def _column(batch: Share) -> list[Micro]:
    return [micros[batch.micro] for micros in batch.block.micros]


def shares(places: range, ctx_len: int, sizes: Sequence[int], seed: int) -> Tensor:
    """Deal out the tokens of each sequence to the steps of a block, in proportion to the steps' sizes.

    The order of a sequence's tokens is drawn from the seed and the sequence's place in the run; so is, by less than one
    token, where each step's share begins, which makes steps equally long on average if a sequence cannot be divided
    evenly.

    Args:
        places: Of the sequences.
        ctx_len: Tokens per sequence (T).
        sizes: Sequences that each step would have without mixing.
        seed: The run's.

    Returns:
        int64 `[sequences, T]`: each token's step, counted from the block's first.
    """
    ends = np.cumsum(sizes)[:-1] * (ctx_len / sum(sizes))
    steps_BT = np.empty((len(places), ctx_len), np.int64)
    for row, place in enumerate(places):
        random = np.random.default_rng((seed, place))
        starts = np.floor(ends + random.random()).astype(np.int64)
        steps_BT[row, random.permutation(ctx_len)] = np.searchsorted(starts, np.arange(ctx_len), side="right")
    return torch.from_numpy(steps_BT)
