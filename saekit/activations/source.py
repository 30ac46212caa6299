"""The protocol of sources. A step's activations depend only on its number, the seed and the global batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import Site
from saekit.config import TrainConfig
from saekit.data import read_ahead
from saekit.errors import UserError

Batch = Any
"""One micro-batch of a rank, as a source reads it: token ids, or anything else that identifies the activations."""


class Activations(NamedTuple):
    """The activations that a source gives for a micro-batch."""

    of: dict[str, Tensor]
    """`[N, D]` by hookpoint, in order. They belong to the caller, which removes them one by one."""
    counted_N: Tensor | None = None
    """bool `[N]`: which rows are counted. None if all are, because the source dropped excluded tokens."""


class Tokens(NamedTuple):
    """The tokens that the rows of a micro-batch's activations belong to, in order."""

    places: range
    """The positions of its sequences in the run's order, which do not depend on the number of ranks."""
    rows: Tensor
    """bool `[sequences, tokens]`, on the CPU: which tokens have a row."""
    counted: Tensor | None
    """bool, of the same shape: which tokens are counted. None if all tokens with a row are."""


class Source(ABC):
    """Gives every optimizer step its activations.

    The trainer first calls `begin` with the run and this rank's part in it, then opens the source (`with
    source.open():`), and then calls it for activations. A thread that reads ahead calls `read`. The training's own
    thread calls everything else.

    `--source` chooses among the sources registered in `saekit.registry.SOURCES`. A registered source is called with the
    run's configuration (`RunConfig`), its placement, a function that shows a line of text, and the objects in memory
    that were passed to `saekit.train`.
    """

    name: str
    """The language model's name, saved with every checkpoint."""
    other_name: str | None = None
    """The second model's name, if the activations come from two models."""
    data_name: str
    """The data set's name."""
    dtype: torch.dtype = torch.float32
    """The activations' type."""
    language_model: Any = None
    """The `LiveModel` behind the activations, which evaluations between steps need. None if there is none."""
    excluded: Tensor = torch.zeros(0, dtype=torch.int64)
    """int64: ids of excluded tokens, saved with every checkpoint. Empty if the source has no token ids."""

    read_options: Mapping[str, Any] = MappingProxyType({})
    """Options in place of the run's own with which a live model would read all that this source reads. They are saved
    with every checkpoint, so that an evaluation knows what was not read."""

    cache: str | None = None
    """A checksum that tells the cache of activations from others; None without one. A resumed run has the same."""

    hookpoints: tuple[Hookpoint, ...]
    """The hookpoints of every step. `begin` sets this attribute and those that follow."""
    sites: tuple[Site, ...] | None = None
    """What coders read and write, in model order. None for one SAE per hookpoint."""
    ctx_len: int
    """Tokens per sequence."""
    global_batch: int
    """Sequences per optimizer step, over all ranks and micro-batches."""
    num_sequences: int
    """Sequences of the whole run."""

    @property
    def num_steps(self) -> int:
        """Return the number of optimizer steps in the whole run. The last step may be shorter than the others."""
        return -(-self.num_sequences // self.global_batch)

    @abstractmethod
    def begin(self, cfg: TrainConfig, device: torch.device, rank: int, world_size: int) -> None:
        """Prepare for a run: set the hookpoints, the batches, and this rank's slice of each.

        Raises:
            UserError: If the configuration does not fit the source.
        """

    def open(self) -> AbstractContextManager[None]:
        """Return a context for reading activations, which holds hooks or open files."""
        return nullcontext()

    @abstractmethod
    def read(self, step: int) -> list[Batch]:
        """Read this rank's `grad_acc_steps` micro-batches of a step, counted from 0, on the host."""

    @abstractmethod
    def checksum(self, step: int) -> str:
        """Return a checksum of the data that all ranks read in a step."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Return the number of counted tokens in a micro-batch."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Activations:
        """Return the activations of a micro-batch, on the device. `[0, D]` for a rank without a share of the step.

        Either drop excluded tokens, which is cheapest, or mask them on all ranks if shapes must not depend on data.
        """

    def tokens(self, batch: Batch) -> Tokens:
        """Return which tokens the rows of a micro-batch's activations belong to. `--mix` needs this.

        Raises:
            UserError: If the source does not know.
        """
        raise UserError(f"--mix needs a source that tells tokens apart, and {type(self).__name__} does not")

    @property
    def runs_behind(self) -> bool:
        """Return whether the device works through a queue, so that work started early runs while the host waits."""
        return False

    def prefetch(self, batch: Batch) -> None:  # noqa: B027  # only a source that `runs_behind` has work to start
        """Start the work for a micro-batch if the source `runs_behind`. A later call with it returns the result."""

    def forget(self) -> None:  # noqa: B027  # optional: only a source that `runs_behind` holds something
        """Drop prefetched work that was not used, to free its memory. A later call computes it again."""


class Steps:
    """Iterates over the steps of a run with their micro-batches, `(step, batches)`, and reads ahead.

    Args:
        source: The source to read from.
        start: The first step.
        stop: The step after the last one.
    """

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self._source = source
        self._steps = read_ahead(source.read, start, stop)
        self._begun: tuple[int, list[Batch]] | None = None

    @contextmanager
    def open(self) -> Iterator[Steps]:
        """Read ahead until the context ends."""
        with closing(self._steps):
            yield self

    def begin_next(self) -> None:
        """Make the source start the next step's activations, if there is a next step."""
        self._begun = next(self._steps, None)
        if self._begun is not None:
            self._source.prefetch(self._begun[1][0])

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> tuple[int, list[Batch]]:
        """Return the next step and its batches, or raise the error of `Source.read` for it."""
        if self._begun is not None:
            step, self._begun = self._begun, None
            return step
        return next(self._steps)
