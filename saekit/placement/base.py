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
    """The torch optimizers that it uses."""
    averages: bool
    """Whether `export` returns averages, computed from the trained weights and the state, instead of those weights."""

    def prepare(self, lr_scale: float) -> None:
        """Prepare the next step at `lr_scale` times the base learning rates. The host's part, before each `step`."""

    def step(self) -> None:
        """Take the prepared step with the SAE's gradients. The device's part.

        If the decoder's rows are kept at norm 1, projects the gradient before the step and scales the rows after it.
        """

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def defer_gradients(self) -> None:
        """Defer the gradients of matrices to the step, if that saves memory: for units whose gradient one rank has.

        Deferred gradients are in `deferred` instead of `.grad`.
        """

    def deferred(self) -> list[RowSums]:
        """Return the rows whose sums are the deferred gradients."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that is needed to resume exactly, as whole tensors by name."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""

    def average(self) -> dict[str, Tensor]:
        """Return what `export` returns before it scales decoder rows, by parameter name."""

    def export(self) -> dict[str, Tensor]:
        """Return the weights to save, by parameter name. An averaging optimizer trains other weights than these."""


class SaeFactory(Protocol):
    """Makes a unit's SAE with its initial weights, on the CPU.

    The weights are the same on every rank up to rounding, because CPUs and numbers of threads differ. A placement with
    replicas of a unit copies one rank's weights to all of them.
    """

    def __call__(self, hookpoint: str, /, *, blank: bool = False) -> Sae:
        """Make the SAE of a unit.

        Args:
            hookpoint: The unit's name.
            blank: Leave the weights and the selection's state uninitialized to save time: the caller fills them.
        """


OptimizerFactory = Callable[[Sae], LayerOptimizer]


class Placement(Questions, ABC):
    """Holds the SAEs of a bank, brings activations to them, and brings their gradients together.

    The training loop runs the same lines under every placement; nothing else knows about ranks. All ranks must call the
    methods whose docstrings say *collective*, in the same order. Methods that are not abstract are implemented for one
    process.
    """

    device: torch.device
    """Where this rank computes."""
    rank: int = 0
    """This process's rank over all machines. It chooses the slice of the data; rank 0 reports and makes the folder."""
    world_size: int = 1
    """The number of ranks."""

    @classmethod
    @abstractmethod
    def join(cls, layer_map: str | None = None) -> Placement:
        """Join the other processes of this run, if there are any.

        Args:
            layer_map: `--layer-map`. Always None unless `takes_layer_map`.
        """

    @abstractmethod
    def place(self, hookpoints: Costs, make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """Make the SAEs and their optimizers on the ranks that hold them. Collective.

        No rank makes more SAEs at a time than it must.

        Args:
            hookpoints: The units in model order, with the relative cost of a step of each.
            make_sae: Makes a unit's SAE.
            make_optimizer: Makes an SAE's optimizer.
        """

    @abstractmethod
    def layers(self) -> tuple[str, ...]:
        """Return the hookpoints of the units that this rank holds, whole or in part, in model order."""

    def leads(self, hookpoint: str) -> bool:
        """Tell whether this rank leads a unit: exactly one does, and writes its files."""
        return True

    def owners(self) -> dict[str, int]:
        """Return each unit's owner, if each unit is on one of several ranks; otherwise an empty dictionary."""
        return {}

    @abstractmethod
    def sae(self, hookpoint: str) -> Sae:
        """Return the module to call for a unit of this rank."""

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """Bring each unit's activations to the rank that trains it, and yield this rank's. Collective.

        A unit's gradient is complete when the caller asks for the next unit. After the last micro-batch it may then
        travel.

        Args:
            acts: By hookpoint, `[N, D]`. Entries are removed as they are consumed, to free their memory.
            last: Whether this is the step's last micro-batch.

        Yields:
            The hookpoint and the activations, `[N, D]`, of each unit that this rank trains.
        """
        for hookpoint in list(acts):
            yield hookpoint, acts.pop(hookpoint)

    def counted(self, mask_N: Tensor) -> Tensor:
        """Return the mask of counted rows for what `route` yields, the same for all units of this rank. Collective.

        Args:
            mask_N: Bool `[N]`, the mask of the rows that this rank passes to `route`. N is the same on all ranks.
        """
        return mask_N

    @abstractmethod
    def backward(self, hookpoint: str, loss: Tensor) -> None:
        """Add the gradient of one chunk's loss to the unit's gradients. Collective if units are sharded."""

    def travelling(self) -> bool:
        """Tell whether gradients are travelling, so that the device has time for other work before `collect`."""
        return False

    @abstractmethod
    def collect(self) -> dict[str, Tensor]:
        """End the step's backward passes: bring gradients together. Collective.

        Returns:
            For each unit of this rank a scalar that is not finite if the gradient has NaN or Inf: the sum of the
            gradient's elements on this rank, or a bound for deferred gradients.
        """

    @abstractmethod
    def apply(self, lr_scale: float) -> None:
        """Project gradients, step the optimizers, renormalize decoders, drop the gradients. Collective.

        Called after `collect`.

        Args:
            lr_scale: Factor on the base learning rates.
        """

    @abstractmethod
    def skip(self) -> None:
        """Drop the gradients and change nothing else. Called after `collect`, instead of `apply`. Collective."""

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks. Collective."""
        return value

    def share(self, counts: Tensor) -> Tensor:
        """Sum whole numbers about this rank's units over the ranks that train the same units. Collective."""
        return counts

    def gather(self, value: Any) -> list[Any]:
        """Return a small plain value of every rank, in rank order. All ranks wait for each other. Collective."""
        return [value]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run a block on rank 0 first, then on the first rank of each other machine, then on all others. Collective.

        For work whose result is cached: later ranks find it in the cache, which machines may share or not.
        """
        hosts = self.gather(socket.gethostname())
        turn = 0 if self.rank == 0 else 1 if hosts.index(hosts[self.rank]) == self.rank else 2
        for _ in range(turn):
            self.gather(None)
        yield
        for _ in range(2 - turn):
            self.gather(None)

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return the whole numbers of every rank, in rank order. All ranks pass equally many. Collective.

        Faster than `gather`, since it needs one round of messages instead of two: for use in every step.
        """
        return [list(numbers)]

    @abstractmethod
    def whole(self, hookpoint: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Return a unit's whole tensors to save, by name: weights, and optimizer state.

        Returns None on ranks that do not lead the unit. Collective among the unit's ranks; gathers only this unit.
        """

    def each_whole(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
        """Yield the hookpoint and `whole` of every unit that this rank leads, one at a time. Collective.

        If possible, all ranks get a unit at the same time, so that they write at the same time.
        """
        for hookpoint in self.layers():
            if (whole := self.whole(hookpoint)) is not None:
                yield (hookpoint, *whole)

    @abstractmethod
    def whole_sae(self, hookpoint: str) -> Sae:
        """Return a unit's whole SAE on every rank, as a checkpoint would hold it, without changing the training.

        Callers must only read it, and drop it before they ask for the next one, so that a rank has at most one SAE in
        addition to those that it holds. Collective.
        """

    def strays(self) -> dict[str, list[int]]:
        """Return, by hookpoint, the ranks whose replica differs from that of most ranks; empty if all are equal.

        Compares every bit of the weights and of the selection's state. Collective.
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
        """Return the bytes of parameters, gradients and optimizer state that this rank holds now."""

    def watch(self) -> None:  # one process has no others to watch
        """Start to watch the other ranks: until `close`, this process ends when another rank fails."""

    def closing(self, error: BaseException) -> None:  # no other rank waits
        """Note an error of the training before anything is closed: closing may take long, and other ranks wait."""

    def first_to_fail(self) -> bool:
        """Tell a failing rank whether it is the first to fail. Only the first rank's error is shown."""
        return True

    def close(self) -> None:  # one process has no others to leave
        """Leave the other ranks at the end of a successful run. Collective."""

    def shard_bytes(self) -> int | None:
        """Return the bytes of one unit's parameters on this rank if they are sharded; otherwise None."""
        return None
