"""Mixing (`--mix STEPS`): the tokens of one optimizer step come from STEPS times as many sequences.

The language model reads the sequences of STEPS optimizer steps, a block, before the first of these steps. Each step
then trains on a share of the tokens of *every* sequence in the block. The shares are drawn per sequence with the run's
seed. So no tokens travel between ranks, and a step has the same tokens on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from saekit.activations.held import Held, hold
from saekit.activations.source import Activations, Batch, Source, Tokens
from saekit.config import TrainConfig
from saekit.config.sources import MixIn

if TYPE_CHECKING:
    from saekit.activations.live import LiveModel


@dataclass(frozen=True)
class Micro:
    """A rank's micro-batch of one step, as a part of its block."""

    batch: Batch
    start: int
    """The row of the block's buffer where its rows begin."""
    order_N: Tensor
    """int64 `[N]`: the rows of its activations, sorted by the step of the block that trains on them."""
    bounds: tuple[int, ...]
    """Where in this order the rows of each step begin, followed by N."""
    counted_N: Tensor | None
    """bool `[N]`, in this order: which rows are counted. None if all are."""

    def share(self, part: int) -> slice:
        """Return the slice of this order that has the rows of one step."""
        return slice(self.bounds[part], self.bounds[part + 1])

    def count(self, part: int) -> int:
        """Return the number of counted rows of one step."""
        share = self.share(part)
        return share.stop - share.start if self.counted_N is None else int(self.counted_N[share].sum())


@dataclass(frozen=True)
class Block:
    """The sequences of several consecutive steps. `micros[i][m]` is micro-batch m of the block's step i."""

    number: int
    micros: tuple[tuple[Micro, ...], ...]


class Share(NamedTuple):
    """A micro-batch of one step: this step's share of the tokens in `block.micros[i][micro]`, for every i."""

    block: Block
    part: int
    """The step, counted from the block's first step."""
    micro: int


class Mixed(Source):
    """Mixes the tokens of several optimizer steps of another source.

    Args:
        source: The other source. It must say which token each row belongs to (`Source.tokens`).
        steps: Optimizer steps per block. The last block of a run can have fewer.
        where: Where to hold a block's activations until their step. `auto` takes the fastest place with enough room.
        folder: The folder for activations that are held on disk.
    """

    def __init__(self, source: Source, steps: int, where: MixIn, folder: Path) -> None:
        self.source = source
        self._steps, self._where, self._folder = steps, where, folder
        self._read: Block | None = None
        self._held: Held | None = None
        self._begun: tuple[Share, Activations] | None = None

    def begin(self, cfg: TrainConfig, device: torch.device, rank: int, world_size: int) -> None:
        """Prepare for a run. See `Source.begin`.

        Raises:
            UserError: See `Source.begin` of the other source.
        """
        source = self.source
        source.begin(cfg, device, rank, world_size)
        self.name, self.other_name, self.data_name = source.name, source.other_name, source.data_name
        self.dtype, self.excluded = source.dtype, source.excluded
        self.read_options, self.cache = source.read_options, source.cache
        self.hookpoints, self.sites = source.hookpoints, source.sites
        self.ctx_len, self.global_batch, self.num_sequences = source.ctx_len, source.global_batch, source.num_sequences
        self._device, self._seed = device, cfg.data_seed
        self._rows_per_step = cfg.batch_size * cfg.grad_acc_steps * self.ctx_len

    @property
    def language_model(self) -> LiveModel | None:
        """Return the other source's live model."""
        return self.source.language_model

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open the source, and free the block's memory or file afterwards."""
        with self.source.open():
            try:
                yield
            finally:
                self.forget()
                if self._held is not None:
                    self._held.close()
                self._held = self._read = None

    def read(self, step: int) -> list[Share]:
        """Read the tokens of the step's block, unless an earlier step has read them."""
        number, part = divmod(step, self._steps)
        if self._read is None or self._read.number != number:
            self._read = self._read_block(number)
        block = self._read
        return [Share(block, part, micro) for micro in range(len(block.micros[0]))]

    def _read_block(self, number: int) -> Block:
        first = number * self._steps
        steps = range(first, min(first + self._steps, self.num_steps))
        sizes = [min(self.global_batch, self.num_sequences - step * self.global_batch) for step in steps]
        start, columns = 0, []
        for step in steps:
            micros = []
            for batch in self.source.read(step):
                micros.append(self._micro(batch, sizes, start))
                start += len(micros[-1].order_N)
            columns.append(tuple(micros))
        return Block(number, tuple(columns))

    def _micro(self, batch: Batch, sizes: Sequence[int], start: int) -> Micro:
        tokens: Tokens = self.source.tokens(batch)
        steps_BT = shares(tokens.places, self.ctx_len, sizes, self._seed)
        of_rows = steps_BT[tokens.rows]
        counts = torch.bincount(of_rows, minlength=len(sizes)).tolist()
        order_N = of_rows.argsort(stable=True)
        counted_N = None if tokens.counted is None else tokens.counted[tokens.rows][order_N]
        return Micro(batch, start, order_N, (0, *accumulate(counts)), counted_N)

    def checksum(self, step: int) -> str:
        """Return a checksum of the block's data and of the step's share in it."""
        first = step - step % self._steps
        block = [self.source.checksum(each) for each in range(first, min(first + self._steps, self.num_steps))]
        return xxhash.xxh3_128_hexdigest(f"{block} {self._seed} {step - first}".encode())

    def count(self, batch: Share) -> int:
        """Return the number of counted tokens in a micro-batch."""
        return sum(each.count(batch.part) for each in _column(batch))

    def __call__(self, batch: Share) -> Activations:
        """Return a micro-batch's activations. The first call of a block runs the source on the whole block."""
        if self._begun is not None and self._begun[0] is batch:
            acts, self._begun = self._begun[1], None
            return acts
        self.forget()
        if self._held is None or self._held.block is not batch.block:
            self._fill(batch.block)
        return self._take(batch)

    @property
    def runs_behind(self) -> bool:
        """Return whether the other source runs behind."""
        return self.source.runs_behind

    def prefetch(self, batch: Share) -> None:
        """Copy the next step's activations, if they are in the same block. The buffer holds only one block."""
        if self._held is not None and self._held.block is batch.block:
            self._begun = (batch, self._take(batch))

    def forget(self) -> None:
        """Drop the copy that `prefetch` made."""
        self._begun = None

    @cached_property
    def _capacity(self) -> int:
        """Return the largest number of rows in a block."""
        return self._rows_per_step * min(self._steps, self.num_steps)

    def _fill(self, block: Block) -> None:
        """Run the source on the whole block, and store the rows of each micro-batch sorted by step."""
        if self._held is not None:
            self._held.block = None  # it is being overwritten
        for micro in (each for micros in block.micros for each in micros):
            acts = self.source(micro.batch)
            if self._held is None:
                dtypes = {name: each.dtype for name, each in acts.of.items()}
                self._held = hold(self._where, self.hookpoints, dtypes, self._capacity, self._device, self._folder)
            order_N = micro.order_N.to(self._device)
            for name in list(acts.of):
                self._held.put(name, micro.start, acts.of.pop(name), order_N)
        assert self._held is not None, "a block has a step"
        self._held.finish()
        self._held.block = block

    def _take(self, batch: Share) -> Activations:
        """Gather a micro-batch's activations from the buffer."""
        assert self._held is not None, "filled"
        own = [(each, each.share(batch.part)) for each in _column(batch)]
        spans = [slice(each.start + share.start, each.start + share.stop) for each, share in own]
        counted = [each.counted_N[share] for each, share in own if each.counted_N is not None]
        of = {each.name: self._held.take(each.name, spans) for each in self.hookpoints}
        return Activations(of, torch.cat(counted).to(self._device) if counted else None)


def _column(batch: Share) -> list[Micro]:
    return [micros[batch.micro] for micros in batch.block.micros]


def shares(places: range, ctx_len: int, sizes: Sequence[int], seed: int) -> Tensor:
    """Distribute the tokens of each sequence over the steps of a block, in proportion to the steps' sizes.

    The order of a sequence's tokens is drawn from the seed and the sequence's position in the run. The start of each
    step's share is shifted at random by less than one token, so that steps are equally long on average if a sequence
    cannot be divided evenly.

    Args:
        places: The sequences' positions in the run's order.
        ctx_len: T, tokens per sequence.
        sizes: The number of sequences that each step would have without mixing.
        seed: The run's seed.

    Returns:
        int64 `[sequences, T]`: each token's step, counted from the block's first step.
    """
    ends = np.cumsum(sizes)[:-1] * (ctx_len / sum(sizes))
    steps_BT = np.empty((len(places), ctx_len), np.int64)
    for row, place in enumerate(places):
        random = np.random.default_rng((seed, place))
        starts = np.floor(ends + random.random()).astype(np.int64)
        steps_BT[row, random.permutation(ctx_len)] = np.searchsorted(starts, np.arange(ctx_len), side="right")
    return torch.from_numpy(steps_BT)
