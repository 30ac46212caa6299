"""Coders that are whole on their rank, each with its own optimizer; and the placement single, of one process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from saekit.placement.base import LayerOptimizer, OptimizerFactory, Placement, SaeFactory
from saekit.placement.costs import Costs
from saekit.sae import Sae
from saekit.sae.model import around


class LocalBank(Placement):
    """Holds whole parameters and whole optimizer states: what `single`, `ddp` and `layer-map` share."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._saes: dict[str, Sae] = {}
        self._optimizers: dict[str, LayerOptimizer] = {}

    def place(self, hookpoints: Costs, make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """Make each SAE and its optimizer on this rank's device. Gradients of one rank alone may be deferred."""
        for hookpoint in hookpoints:
            sae = make_sae(hookpoint).train()
            if sae.device != self.device:
                sae.to(self.device)
            self._saes[hookpoint] = sae
            self._optimizers[hookpoint] = make_optimizer(sae)
            if self.owns_gradient:
                self._optimizers[hookpoint].defer_gradients()

    def layers(self) -> tuple[str, ...]:
        """Return the hookpoints that `place` was given."""
        return tuple(self._saes)

    def sae(self, hookpoint: str) -> Sae:
        """Return the module that holds the parameters."""
        return self._saes[hookpoint]

    def backward(self, hookpoint: str, loss: Tensor) -> None:
        """Run autograd's backward pass."""
        loss.backward()

    def collect(self) -> dict[str, Tensor]:
        """Sum each layer's gradients, and bound deferred ones. Nothing travels."""
        sums = {}
        for hookpoint, sae in self._saes.items():
            parts = [each.grad.sum() for each in sae.parameters() if each.grad is not None]
            parts += [each.bound() for each in self._optimizers[hookpoint].deferred()]
            sums[hookpoint] = sum(parts, torch.zeros((), device=self.device))
        return sums

    def apply(self, lr_scale: float) -> None:
        """Step each layer's optimizer (which projects and renormalizes) and drop the gradients."""
        for optimizer in self._optimizers.values():
            optimizer.prepare(lr_scale)
        for optimizer in self._optimizers.values():
            optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Set the gradients to None."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()

    def whole(self, hookpoint: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """Return the exported weights and the optimizer's state, if this rank leads the layer."""
        optimizer = self._optimizers[hookpoint]
        return (optimizer.export(), optimizer.state()) if self.leads(hookpoint) else None

    def whole_sae(self, hookpoint: str) -> Sae:
        """Wrap the exported weights. They share memory with the trained weights, unless the optimizer averages."""
        return around(self._optimizers[hookpoint].export(), **self._saes[hookpoint].sizes()).eval()

    def load(self, hookpoint: str, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Copy the weights into the parameters, and the state into the optimizer."""
        self._saes[hookpoint].load_state_dict(dict(weights))
        self._optimizers[hookpoint].load_state(state)

    def held_bytes(self) -> int:
        """Count each tensor once, since the state of some optimizers contains the parameters."""
        parameters = [parameter for sae in self._saes.values() for parameter in sae.parameters()]
        gradients = [each.grad for each in parameters if each.grad is not None]
        deferred = [tensor for each in self._optimizers.values() for sums in each.deferred() for tensor in sums]
        states = [tensor for each in self._optimizers.values() for tensor in each.state().values()]
        held = {tensor.data_ptr(): tensor for tensor in (*parameters, *gradients, *deferred, *states)}
        return size_of(held.values())


class Single(LocalBank):
    """Holds everything on one device of one process. Routing and reducing do nothing."""

    name = "single"
    title = "one process holds all SAEs"
    ranked = False

    @classmethod
    def join(cls, layer_map: str | None = None) -> Single:
        """Take the device that accelerate chooses. There are no other processes to join."""
        from accelerate import Accelerator

        device = Accelerator().device
        # Apple GPUs (mps) lack the float64 that statistics need.
        return cls(torch.device("cpu") if device.type == "mps" else device)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the total bytes of several tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
