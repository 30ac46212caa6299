"""One process that owns every layer: the null object among the placements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from saekit.placement.base import LayerOptimizer, OptimizerFactory
from saekit.sae import Sae, normalize_decoder_, project_decoder_gradient_


class Single:
    """Everything on one device; routing and reducing are the identity. Implements `Placement`."""

    name = "single"
    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._saes: dict[str, Sae] = {}
        self._optimizers: dict[str, LayerOptimizer] = {}

    def place(self, bank: dict[str, Sae], make_optimizer: OptimizerFactory) -> None:
        """See `Placement.place`."""
        for hookpoint, sae in bank.items():
            self._saes[hookpoint] = sae.to(self.device).train()
            self._optimizers[hookpoint] = make_optimizer(sae)

    def layers(self) -> tuple[str, ...]:
        """See `Placement.layers`."""
        return tuple(self._saes)

    def sae(self, hookpoint: str) -> Sae:
        """See `Placement.sae`."""
        return self._saes[hookpoint]

    def route(self, acts: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """See `Placement.route`."""
        for hookpoint in list(acts):
            yield hookpoint, acts.pop(hookpoint)

    def backward(self, hookpoint: str, loss: Tensor) -> None:
        """See `Placement.backward`."""
        loss.backward()

    def apply(self, lr_scale: float) -> None:
        """See `Placement.apply`."""
        for hookpoint, sae in self._saes.items():
            optimizer = self._optimizers[hookpoint]
            if sae.normalize_decoder:
                project_decoder_gradient_(sae)
            optimizer.step(lr_scale)
            if sae.normalize_decoder:
                normalize_decoder_(sae)
            optimizer.zero_grad()

    def sum(self, value: Tensor) -> Tensor:
        """See `Placement.sum`."""
        return value

    def weights(self, hookpoint: str) -> dict[str, Tensor]:
        """See `Placement.weights`."""
        return self._optimizers[hookpoint].export()

    def optimizer_state(self, hookpoint: str) -> dict[str, Tensor]:
        """See `Placement.optimizer_state`."""
        return self._optimizers[hookpoint].state()

    def load_optimizer_state(self, hookpoint: str, state: Mapping[str, Tensor]) -> None:
        """See `Placement.load_optimizer_state`."""
        self._optimizers[hookpoint].load_state(state)
