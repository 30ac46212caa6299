"""Where activations come from. The content of a step is a function of its number, the seed and the global batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import Site
from saekit.config import TrainConfig
from saekit.data import read_ahead
from saekit.errors import UserError

if TYPE_CHECKING:
    from saekit.activations.live import LiveModel

Batch = Any
"""One micro-batch of a rank, as a source reads it: token ids, or whatever tells it the activations to give."""


class Activations(NamedTuple):
    """The activations that a source gives for a micro-batch."""

    of: dict[str, Tensor]
    """`[N, D]` by hookpoint, in order; they belong to the caller, who removes them one by one."""
    counted_N: Tensor | None = None
    """bool `[N]`: which of the rows are counted; None for all, if the source has dropped the others."""


class Tokens(NamedTuple):
    """The tokens of a micro-batch: which its activations have rows of, in order."""

    places: range
    """The places of its sequences in the run's order; the same on any number of ranks."""
    rows: Tensor
    """bool `[sequences, tokens]`, on the CPU: which have a row."""
    counted: Tensor | None
    """The same of those that are counted; None if all that have a row are."""


class Source(ABC):
    """Gives every optimizer step its activations.

    A source is made; `begin` tells it the run and this rank's slice of it; it is opened (`with source.open():`); then
    it is called for activations. A thread that reads ahead calls `read`; the training's own thread calls the rest.

    One that is registered in `saekit.registry.SOURCES` is chosen by `--source`, and called with the run's configuration
    (`RunConfig`), its placement, a function that shows a line of text, and what a caller of `saekit.train` has loaded.
    """

    name: str
    """The language model's name, saved with every checkpoint."""
    other_name: str | None = None
    """The second one's, where the activations are those of two."""
    data_name: str
    """The data set's name."""
    dtype: torch.dtype = torch.float32
    """Of the activations."""
    language_model: LiveModel | None = None
    """The live model behind the activations, which evaluations between steps need; None if there is none."""
    excluded: Tensor = torch.zeros(0, dtype=torch.int64)
    """int64: ids of excluded tokens, saved with every checkpoint; empty if the source has no token ids."""

    hookpoints: tuple[Hookpoint, ...]
    """The hookpoints of every step. `begin` sets this attribute and those that follow."""
    sites: tuple[Site, ...] | None = None
    """What coders read and write of these, in model order; None for an SAE of each."""
    ctx_len: int
    """Tokens per sequence."""
    global_batch: int
    """Sequences per optimizer step, over all ranks and micro-batches."""
    num_sequences: int
    """Sequences of the whole run."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; the last may be shorter than the others."""
        return -(-self.num_sequences // self.global_batch)

    @abstractmethod
    def begin(self, cfg: TrainConfig, device: torch.device, rank: int, world_size: int) -> None:
        """Resolve what depends on the run: hookpoints, batches, and this rank's slice of each.

        Raises:
            UserError: If the configuration does not fit the source.
        """

    def open(self) -> AbstractContextManager[None]:
        """Return a context that holds what is needed while activations are read: hooks, files."""
        return nullcontext()

    @abstractmethod
    def read(self, step: int) -> list[Batch]:
        """Read this rank's micro-batches of a step, counted from 0: `grad_acc_steps` of them, on the host."""

    @abstractmethod
    def checksum(self, step: int) -> str:
        """Return a checksum of what all ranks read in a step; other data has another."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Count the tokens of a micro-batch that are not excluded."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Activations:
        """Give the activations of a micro-batch, on the device; `[0, D]` for a rank without a share of the step.

        Excluded tokens are dropped, which is cheapest, or masked by all ranks, where shapes must not depend on data.
        """

    def tokens(self, batch: Batch) -> Tokens:
        """Tell which tokens the rows of a micro-batch's activations belong to, which `--mix` needs.

        Raises:
            UserError: If the source cannot tell.
        """
        raise UserError(f"--mix needs a source that tells tokens apart, and {type(self).__name__} does not")

    @property
    def runs_behind(self) -> bool:
        """Tell whether the device works through a queue, so that work begun early fills the time the host waits."""
        return False

    def prefetch(self, batch: Batch) -> None:  # noqa: B027  # nothing to begin, unless it runs behind
        """Begin the work for a micro-batch, where the source `runs_behind`; calling with it later gives the result."""

    def forget(self) -> None:  # noqa: B027  # nothing is held, unless it runs behind
        """Drop what was begun and not asked for: its memory is needed. Calling with it later computes it again."""


class Steps:
    """The steps of a run with their micro-batches, read ahead: an iterator of `(step, batches)`.

    Args:
        source: What reads them.
        start: The first step.
        stop: The step after the last one.
    """

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self._source = source
        self._steps = read_ahead(source.read, start, stop)
        self._begun: tuple[int, list[Batch]] | None = None

    @contextmanager
    def open(self) -> Iterator[Steps]:
        """Reading ahead ends with the context."""
        with closing(self._steps):
            yield self

    def begin_next(self) -> None:
        """Let the source begin the next step's activations, if there is a next step."""
        self._begun = next(self._steps, None)
        if self._begun is not None:
            self._source.prefetch(self._begun[1][0])

    def __iter__(self) -> Steps:
        return self

    def __next__(self) -> tuple[int, list[Batch]]:
        """Raises what `Source.read` raised for the step."""
        if self._begun is not None:
            step, self._begun = self._begun, None
            return step
        return next(self._steps)
