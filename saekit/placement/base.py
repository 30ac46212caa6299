"""Where SAE parameters live: one small interface, the same for every placement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from saekit.sae import Sae
from saekit.sae.kernels.row_sums import RowSums


class LayerOptimizer(Protocol):
    """What updates one layer's parameters."""

    optimizers: list[torch.optim.Optimizer]
    """The torch optimisers behind it."""
    averages: bool
    """Whether `export` gives other weights than those that are trained, made of them and of the state."""

    def prepare(self, lr_scale: float) -> None:
        """Get the next step ready, at `lr_scale` times the base learning rate: the host's part, before each `step`."""

    def step(self) -> None:
        """Take the prepared step, from the SAE's gradients: the device's part.

        Where the decoder's rows are kept at norm 1, the gradient is projected before and the rows are scaled after it.
        """

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def defer_gradients(self) -> None:
        """Let gradients of matrices be left to the step, if that saves memory: for layers of one rank alone.

        They are not in `.grad` then, but in `deferred`.
        """

    def deferred(self) -> list[RowSums]:
        """What those gradients are the sums of that have been left to the step."""

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly, as whole tensors by name."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""

    def export(self) -> dict[str, Tensor]:
        """The weights to keep, by parameter name: an averaging optimiser trains on others than it delivers."""


SaeFactory = Callable[[str], Sae]
"""From a hookpoint to its SAE with initial weights, on the CPU; the same weights on every rank."""
OptimizerFactory = Callable[[Sae], LayerOptimizer]


class Placement(Protocol):
    """Holds the bank of SAEs, brings activations to them and their gradients together.

    The training loop runs the same lines under every placement; nothing else knows of ranks. All ranks call every
    method that a docstring calls *collective*, in the same order.
    """

    name: str
    """As in `--placement`; `single` where there is one process."""
    device: torch.device
    """Where this rank computes."""
    rank: int
    """Which slice of the data this process takes, over all machines. Rank 0 reports and makes the run's folder."""
    world_size: int
    """How many slices there are."""

    def place(self, hookpoints: Sequence[str], make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """Make the SAEs trainable where they belong; no rank makes more of them at a time than it must. Collective."""

    def layers(self) -> tuple[str, ...]:
        """Hookpoints whose SAEs this rank has a part in, in model order."""

    def leads(self, hookpoint: str) -> bool:
        """Whether this rank speaks for a layer: exactly one does, and writes its files."""

    def owners(self) -> dict[str, int]:
        """The rank that holds each layer, where each is held by one of several; else empty."""

    def sae(self, hookpoint: str) -> Sae:
        """The module to call for a layer of this rank."""

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """Hand each layer's activations `[N, D]` to where it trains; yields what this rank trains on. Collective.

        Entries of `acts` are removed as they are consumed, so that their memory is free again. A layer's gradient is
        complete when the loop comes back after it; with `last`, the step's last micro-batch, it may then travel.
        """

    def backward(self, hookpoint: str, loss: Tensor) -> None:
        """Add the gradient of one chunk's loss to the layer's. Collective under zero3."""

    def collect(self) -> dict[str, Tensor]:
        """End the step's backward passes: bring gradients together. Collective.

        Returns:
            For each layer of this rank a scalar, the sum of its gradient as far as this rank holds it, or a bound of
            what is deferred: NaN or Inf in the gradient show in it.
        """

    def apply(self, lr_scale: float) -> None:
        """After `collect`: project, step the optimisers, renormalise decoders, drop the gradients. Collective."""

    def skip(self) -> None:
        """After `collect`, instead of `apply`: drop the gradients, and leave everything as it is. Collective."""

    def sum(self, value: Tensor) -> Tensor:
        """A tensor summed over all ranks. Collective."""

    def share(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Integer counts per layer, summed over the ranks that train the layer. Collective."""

    def gather(self, value: Any) -> list[Any]:
        """A small plain value of every rank, in rank order; also the point where all ranks wait. Collective."""

    def whole(self, hookpoint: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The layer's whole tensors to keep, by name: weights and optimiser state. None on ranks that do not lead it.

        Collective among the layer's ranks; no more than one layer is gathered at a time.
        """

    def each_whole(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
        """`whole` of every layer that this rank leads, with its hookpoint, one at a time. Collective.

        Ranks get theirs at the same time where that is possible, so that they can write them at the same time.
        """

    def whole_sae(self, hookpoint: str) -> Sae:
        """The layer's SAE as a checkpoint would hold it now, whole, on every rank; training is not touched by it.

        It is for reading, and to be forgotten before the next one is asked for: so no rank ever has more than one that
        it does not hold anyway. Collective.
        """

    def load(self, hookpoint: str, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """The inverse of `whole`, on every rank of the layer."""

    def held_bytes(self) -> int:
        """Bytes of parameters, gradients and optimiser state on this rank at this moment."""

    def first_to_fail(self) -> bool:
        """Called by a rank that ends by an error: whether it is the first, whose error is the one to show."""

    def close(self) -> None:
        """Part from the other ranks at the end of a run that went well. Collective."""

    def shard_bytes(self) -> int | None:
        """Bytes of one layer's parameters on this rank, where they are sharded; else None."""
