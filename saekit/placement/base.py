"""Where SAE parameters live: one small interface, the same for every placement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from saekit.sae import Sae


class LayerOptimizer(Protocol):
    """What updates one layer's parameters."""

    def step(self, lr_scale: float) -> None:
        """One optimiser step at `lr_scale` times the base learning rate; reads `.grad` of the SAE's parameters."""

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly, as whole tensors by name."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""

    def export(self) -> dict[str, Tensor]:
        """The weights to keep, by parameter name: an averaging optimiser trains on others than it delivers."""


OptimizerFactory = Callable[[Sae], LayerOptimizer]


class Placement(Protocol):
    """Holds the bank of SAEs, brings activations to them and their gradients together.

    The training loop runs the same lines under every placement; nothing else knows of ranks.
    """

    name: str
    """As in `--placement`."""
    device: torch.device
    """Where this rank computes."""
    rank: int
    """Which slice of the data this process takes."""
    world_size: int
    """How many slices there are."""

    def place(self, bank: dict[str, Sae], make_optimizer: OptimizerFactory) -> None:
        """Take the SAEs by hookpoint, on the CPU, and make them trainable here."""

    def layers(self) -> tuple[str, ...]:
        """Hookpoints whose tokens this rank trains on."""

    def sae(self, hookpoint: str) -> Sae:
        """The module to call for a layer of this rank."""

    def route(self, acts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Hand each layer's activations `[N, D]` to where it trains; yields what this rank trains on.

        Entries of `acts` are removed as they are consumed, so that their memory is free again.
        """

    def backward(self, hookpoint: str, loss: Tensor) -> None:
        """Add the gradient of one chunk's loss to the layer's."""

    def apply(self, lr_scale: float) -> None:
        """Bring gradients together, project, step the optimisers, renormalise decoders, drop the gradients."""

    def sum(self, value: Tensor) -> Tensor:
        """A statistic of one layer, or of the batch, summed over the ranks that have a part of it."""

    def weights(self, hookpoint: str) -> dict[str, Tensor]:
        """The layer's whole tensors to keep, by parameter name."""

    def optimizer_state(self, hookpoint: str) -> dict[str, Tensor]:
        """The layer's whole optimiser state."""

    def load_optimizer_state(self, hookpoint: str, state: Mapping[str, Tensor]) -> None:
        """The inverse of `optimizer_state`."""
