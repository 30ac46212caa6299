"""The protocol of placements, with defaults that suit one process."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from saekit.placement.costs import Costs
from saekit.placement.questions import Questions
from saekit.sae import Sae
from saekit.sae.kernels.row_sums import RowSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerOptimizer(Protocol):
    """Updates one unit's parameters."""

    optimizers: list[torch.optim.Optimizer]
    """The torch optimizers behind it."""
    averages: bool
    """Whether `export` gives other weights than those that are trained, made of them and of the state."""

    def prepare(self, lr_scale: float) -> None:
        """Prepare the next step, at `lr_scale` times the base learning rate: the host's part, before each `step`."""

    def step(self) -> None:
        """Take the prepared step, from the SAE's gradients: the device's part.

        Where the decoder's rows are kept at norm 1, the gradient is projected before and the rows are scaled after it.
        """

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def defer_gradients(self) -> None:
        """Leave gradients of matrices to the step, if that saves memory: for units whose gradient one rank has.

        They are not in `.grad` then, but in `deferred`.
        """

    def deferred(self) -> list[RowSums]:
        """Return the rows whose sums are the gradients that have been left to the step."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that an exact continuation needs, as whole tensors by name."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""

    def average(self) -> dict[str, Tensor]:
        """Return what `export` makes of each element alone, by parameter name: decoder rows have any norm yet."""

    def export(self) -> dict[str, Tensor]:
        """Return the weights to save, by parameter name; an averaging optimizer trains others than it delivers."""


class SaeFactory(Protocol):
    """Makes a unit's SAE with its initial weights, on the CPU.

    They are the same on every rank up to rounding: CPUs differ, and numbers of threads. A placement that has replicas
    of a unit gives all of them the weights of one rank.
    """

    def __call__(self, hookpoint: str, /, *, blank: bool = False) -> Sae:
        """Make it.

        Args:
            hookpoint: Whose SAE it is.
            blank: Leave its weights and the selection's state open, which takes no time: the caller fills them.
        """


OptimizerFactory = Callable[[Sae], LayerOptimizer]


class Placement(Questions, ABC):
    """Holds the SAEs of a bank, brings activations to them and their gradients together.

    The training loop runs the same lines under every placement; nothing else knows of ranks. All ranks call every
    method that a docstring calls *collective*, in the same order. Methods that are not abstract do what one process
    does.
    """

    device: torch.device
    """Where this rank computes."""
    rank: int = 0
    """Which slice of the data this process takes, over all machines. Rank 0 reports and makes the run's folder."""
    world_size: int = 1
    """The number of slices."""

    @classmethod
    @abstractmethod
    def join(cls, layer_map: str | None = None) -> Placement:
        """Join the other processes of this run, if there are any.

        Args:
            layer_map: `--layer-map`; None except where `takes_layer_map`.
        """

    @abstractmethod
    def place(self, hookpoints: Costs, make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """Make the SAEs trainable where they belong; no rank makes more of them at a time than it must. Collective.

        Args:
            hookpoints: The units in model order, with what a step of each costs relative to the others.
            make_sae: Makes a unit's SAE.
            make_optimizer: Makes its optimizer.
        """

    @abstractmethod
    def layers(self) -> tuple[str, ...]:
        """Return the hookpoints of the units that this rank has a part in, in model order."""

    def leads(self, hookpoint: str) -> bool:
        """Tell whether this rank leads a unit: exactly one does, and writes its files."""
        return True

    def owners(self) -> dict[str, int]:
        """Return the rank that holds each unit, if each is on one of several ranks; else nothing."""
        return {}

    @abstractmethod
    def sae(self, hookpoint: str) -> Sae:
        """Return the module to call for a unit of this rank."""

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """Bring each unit's activations `[N, D]` to where it trains; yields what this rank trains on. Collective.

        Entries of `acts` are removed as they are consumed, so that their memory is free again. A unit's gradient is
        complete when the loop comes back after it; with `last`, the step's last micro-batch, it may then travel.
        """
        for hookpoint in list(acts):
            yield hookpoint, acts.pop(hookpoint)

    def counted(self, mask_N: Tensor) -> Tensor:
        """Tell which of the rows that arrive from `route` are counted, the same for all units of this rank. Collective.

        Args:
            mask_N: Bool; which of the rows are counted that this rank gives to `route`. All ranks give equally many.
        """
        return mask_N

    @abstractmethod
    def backward(self, hookpoint: str, loss: Tensor) -> None:
        """Add the gradient of one chunk's loss to the unit's. Collective if units are sharded."""

    def travelling(self) -> bool:
        """Tell whether gradients are on their way, so that the device has time for other work before `collect`."""
        return False

    @abstractmethod
    def collect(self) -> dict[str, Tensor]:
        """End the step's backward passes: bring gradients together. Collective.

        Returns:
            For each unit of this rank a scalar, the sum of its gradient as far as this rank holds it, or a bound of
            what is deferred; it shows NaN or Inf in the gradient.
        """

    @abstractmethod
    def apply(self, lr_scale: float) -> None:
        """After `collect`: project, step the optimizers, renormalize decoders, drop the gradients. Collective."""

    @abstractmethod
    def skip(self) -> None:
        """After `collect`, instead of `apply`: drop the gradients, and leave everything as it is. Collective."""

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks. Collective."""
        return value

    def share(self, counts: Tensor) -> Tensor:
        """Whole numbers about this rank's units, summed over the ranks that train the same units. Collective."""
        return counts

    def gather(self, value: Any) -> list[Any]:
        """Return a small plain value of every rank, in rank order; also the point where all ranks wait. Collective."""
        return [value]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run a block on rank 0 first, then on the first rank of each other machine, then on all others. Collective.

        For what is left in a cache, and found there by the next: machines may share one, or each may have its own.
        """
        hosts = self.gather(socket.gethostname())
        turn = 0 if self.rank == 0 else 1 if hosts.index(hosts[self.rank]) == self.rank else 2
        for _ in range(turn):
            self.gather(None)
        yield
        for _ in range(2 - turn):
            self.gather(None)

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return whole numbers of every rank, in rank order; all ranks give equally many. Collective.

        As `gather` without its second round of messages: for what ranks tell each other in every step.
        """
        return [list(numbers)]

    @abstractmethod
    def whole(self, hookpoint: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Return the unit's whole tensors to save, by name: weights and optimizer state. None on ranks that don't lead.

        Collective among the unit's ranks; at most one unit is gathered at a time.
        """

    def each_whole(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
        """Yield `whole` of every unit that this rank leads, with its hookpoint, one at a time. Collective.

        Ranks get theirs at the same time if possible, so that they can write at the same time.
        """
        for hookpoint in self.layers():
            if (whole := self.whole(hookpoint)) is not None:
                yield (hookpoint, *whole)

    @abstractmethod
    def whole_sae(self, hookpoint: str) -> Sae:
        """Return the unit's SAE as a checkpoint would hold it now, whole, on every rank, without changing the training.

        Callers only read it, and drop it before they ask for the next one, so no rank has more than one that it does
        not hold anyway. Collective.
        """

    def strays(self) -> dict[str, list[int]]:
        """Return the ranks whose replica of a unit is not that of most ranks, by hookpoint; empty if all are alike.

        Every bit of the weights and of the selection's state counts. Collective.
        """
        return {}

    @abstractmethod
    def load(self, hookpoint: str, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Restore what `whole` returned, on every rank of the unit."""

    def load_sharded(self, load: Callable[[], PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
        """Load the language model sharded over the ranks, if `shards_lm`. Collective.

        Args:
            load: Loads it with transformers.
            dtype: The type of its weights.
        """
        raise NotImplementedError(f"{self.name} does not shard the language model: see `shards_lm`")

    @abstractmethod
    def held_bytes(self) -> int:
        """Return the bytes of parameters, gradients and optimizer state on this rank at this moment."""

    def watch(self) -> None:  # one process has no others to watch
        """End this process when another rank has failed, from now on until `close`."""

    def closing(self, error: BaseException) -> None:  # nobody waits for one process
        """Note that training has raised an error, before anything is closed: that may take long, and others wait."""

    def first_to_fail(self) -> bool:
        """Tell a rank that ends with an error whether it is the first, whose error is the one to show."""
        return True

    def close(self) -> None:  # one process has no others to leave
        """Leave the other ranks at the end of a run that went well. Collective."""

    def shard_bytes(self) -> int | None:
        """Return the bytes of one unit's parameters on this rank, if they are sharded; else None."""
        return None
