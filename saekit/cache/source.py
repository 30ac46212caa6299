"""The source that reads a cache: the activations of each step from disk, without a language model."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saekit.activations.live import LiveModel, to_device
from saekit.activations.sites import Site, hookpoints_of
from saekit.activations.source import Activations, Source, Tokens
from saekit.cache.index import Index, missing_shards
from saekit.cache.shard import ShardReader
from saekit.config import TrainConfig
from saekit.data import StepBatches
from saekit.errors import UserError
from saekit.units import plural

OPEN_SHARDS = 4
"""Mapped at the same time."""


class Micro(NamedTuple):
    """A micro-batch of a rank, read from disk."""

    places: range
    """Of its sequences in the run's order."""
    ids: Tensor
    """int64 `[B, T]`."""
    of: dict[str, Tensor] | None
    """By hookpoint `[B, T, D]`, on the CPU; None if they are read when they are needed."""


class Places:
    """The sequences of a cache, in the order in which a run visits them. Implements `saekit.data.Sequences`.

    Args:
        folder: The cache.
        index: What it is of.
        order: int64: the place in the cache of each of the run's sequences.
    """

    def __init__(self, folder: Path, index: Index, order: np.ndarray) -> None:
        self._folder, self._index, self._order = folder, index, order
        self.ctx_len = index.ctx_len
        self._shards: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()  # a save asks for a step's checksum while a thread reads ahead

    def __len__(self) -> int:
        return len(self._order)

    def read(self, numbers: np.ndarray) -> Tensor:
        """Return token ids, int64 `[B, T]`."""
        found = [shard.ids(rows) for shard, rows in self._spans(numbers)]
        return torch.cat(found) if found else torch.empty(0, self.ctx_len, dtype=torch.int64)

    def acts(self, numbers: np.ndarray, name: str) -> Tensor:
        """Return a hookpoint's activations `[B, T, D]`."""
        found = [shard.acts(name, rows) for shard, rows in self._spans(numbers)]
        empty = (0, self.ctx_len, self._index.hookpoints[name])
        return torch.cat(found) if found else torch.empty(empty, dtype=self._index.read_dtype)

    def _spans(self, numbers: np.ndarray) -> Iterator[tuple[ShardReader, range]]:
        """Yield sequences that lie next to each other in a shard, so that they are read together."""
        places = self._order[numbers]
        size = self._index.shard_sequences
        cuts = np.flatnonzero((np.diff(places) != 1) | (np.diff(places // size) != 0)) + 1
        for part in np.split(places, cuts) if len(places) else ():
            shard, row = divmod(int(part[0]), size)
            yield self._shard(shard), range(row, row + len(part))

    def _shard(self, number: int) -> ShardReader:
        with self._lock:
            if number not in self._shards:
                self._shards[number] = ShardReader(self._folder, self._index, number)
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(number)
            return self._shards[number]


class Cached(Source):
    """A cache of activations. A thread reads ahead of the training, so a step finds its activations in memory.

    With `--mix` nothing but token ids is read ahead: the activations of a whole block would be in memory twice.

    Args:
        folder: The cache.
        index: What it is of.
        sites: What coders read and write of its hookpoints.
        language_model: The live model, for evaluations between steps.
    """

    def __init__(
        self, folder: Path, index: Index, sites: tuple[Site, ...], language_model: LiveModel | None = None
    ) -> None:
        self._folder, self.index = folder, index
        self.name, self.data_name = index.model, index.dataset
        self.sites = sites
        self.hookpoints = hookpoints_of(sites)
        self.dtype = index.read_dtype
        self.cache = index.fingerprint
        self.ctx_len = index.ctx_len
        self.language_model = language_model

    def begin(self, cfg: TrainConfig, device: torch.device, rank: int, world_size: int) -> None:
        """Cut the cache into steps.

        Raises:
            UserError: If the cache is incomplete, or was not made for such a run.
        """
        index = self.index
        self._device, self._cut = device, (rank, world_size, cfg.grad_acc_steps)
        self._reads_ahead = cfg.mix == 1
        special = index.special_tokens if cfg.exclude_special_tokens else []
        self.excluded = torch.tensor(sorted({*cfg.exclude_tokens, *special}), dtype=torch.int64)
        self.global_batch = cfg.batch_size * cfg.grad_acc_steps * world_size
        order = order_of(index, cfg.order_seed)
        self.read_options = read_options(index, cfg)
        self._places = Places(self._folder, index, order)
        self._batches = StepBatches(self._places, self.global_batch, None, cfg.max_tokens)
        self.num_sequences = self._batches.num_sequences
        needed = set((order[: self.num_sequences] // index.shard_sequences).tolist())
        if missing := sorted(needed.intersection(missing_shards(self._folder, index))):
            whole = missing[0] * index.shard_sequences * index.ctx_len
            part = f", or read its first --max-tokens {whole}" if whole and not self.read_options else ""
            raise UserError(
                f"{self._folder} is incomplete: {plural(len(missing), 'shard')} of {index.num_shards} missing. "
                f"Continue it with the same saekit cache{part}"
            )
        if self.language_model is not None:
            self.language_model.begin(cfg, device, rank, world_size)

    def read(self, step: int) -> list[Micro]:
        """Read this rank's activations of a step from disk."""
        found = []
        for places in self._batches.shares(step, *self._cut):
            of = self._acts(places) if self._reads_ahead else None
            found.append(Micro(places, self._places.read(np.arange(places.start, places.stop)), of))
        return found

    def _acts(self, places: range) -> dict[str, Tensor]:
        numbers = np.arange(places.start, places.stop)
        return {each.name: self._places.acts(numbers, each.name) for each in self.hookpoints}

    def checksum(self, step: int) -> str:
        """Return a checksum of the step's token ids."""
        return self._batches.checksum(step)

    def count(self, batch: Micro) -> int:
        """Count a micro-batch's tokens that are not excluded."""
        return int(self._counted(batch).sum())

    def _counted(self, batch: Micro) -> Tensor:
        return ~torch.isin(batch.ids, self.excluded)

    def tokens(self, batch: Micro) -> Tokens:
        """Tell which tokens have rows: those that are not excluded."""
        return Tokens(batch.places, self._counted(batch), None)

    def __call__(self, batch: Micro) -> Activations:
        """Give the activations of the tokens that are not excluded."""
        rows_N = self._counted(batch).flatten().nonzero().squeeze(1)
        acts = self._acts(batch.places) if batch.of is None else batch.of
        chosen = {name: x_BTD.flatten(0, 1).index_select(0, rows_N) for name, x_BTD in acts.items()}
        return Activations({name: to_device(x_ND, self._device) for name, x_ND in chosen.items()})


def read_options(index: Index, cfg: TrainConfig) -> dict[str, Any]:
    """Return the options with which a run without a cache reads all that a run on the cache reads.

    In the cache's order these are the run's own. In another order the run can visit any of the cache's sequences, which
    are not those that the same seed draws from the whole data set.
    """
    if cfg.order_seed == index.data_seed:
        return {}
    return {**index.order_options, "max_tokens": index.sequences * index.ctx_len}


def order_of(index: Index, seed: int | None) -> np.ndarray:
    """Return the place in the cache of each sequence of a run.

    The cache's own seed reads it from start to end. Another seed shuffles batches of sequences, which lie next to each
    other on the disk.

    Raises:
        UserError: If the data set's own order is wanted, and the cache has another.
    """
    places = np.arange(index.sequences)
    if seed == index.data_seed:
        return places
    if seed is None:
        raise UserError(
            f"--no-shuffle: the cache holds the sequences in the random order of --data-seed {index.data_seed}, not in "
            "the data set's. Leave out --no-shuffle, or make a cache with it"
        )
    whole = index.sequences // index.batch_size
    batches = np.random.default_rng(seed).permutation(whole)
    shuffled = places[: whole * index.batch_size].reshape(whole, index.batch_size)[batches].reshape(-1)
    return np.concatenate([shuffled, places[whole * index.batch_size :]])
