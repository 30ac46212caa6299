"""SAEs that are whole on this rank, each with an optimiser of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from saekit.placement.base import LayerOptimizer, OptimizerFactory, SaeFactory
from saekit.sae import Sae
from saekit.sae.model import around


class LocalBank:
    """The part that `single`, `ddp` and `layer-map` share: whole parameters and whole optimiser states."""

    alone = True
    """Whether a layer's gradient is all on the rank that steps it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._saes: dict[str, Sae] = {}
        self._optimizers: dict[str, LayerOptimizer] = {}

    def place(self, hookpoints: Sequence[str], make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """See `Placement.place`."""
        for hookpoint in hookpoints:
            sae = make_sae(hookpoint).to(self.device).train()
            self._saes[hookpoint] = sae
            self._optimizers[hookpoint] = make_optimizer(sae)
            if self.alone:
                self._optimizers[hookpoint].defer_gradients()

    def layers(self) -> tuple[str, ...]:
        """See `Placement.layers`."""
        return tuple(self._saes)

    def owners(self) -> dict[str, int]:
        """See `Placement.owners`."""
        return {}

    def sae(self, hookpoint: str) -> Sae:
        """See `Placement.sae`."""
        return self._saes[hookpoint]

    def backward(self, hookpoint: str, loss: Tensor) -> None:
        """See `Placement.backward`."""
        loss.backward()

    def collect(self) -> dict[str, Tensor]:
        """See `Placement.collect`."""
        sums = {}
        for hookpoint, sae in self._saes.items():
            parts = [each.grad.sum() for each in sae.parameters() if each.grad is not None]
            parts += [each.bound() for each in self._optimizers[hookpoint].deferred()]
            sums[hookpoint] = sum(parts, torch.zeros((), device=self.device))
        return sums

    def apply(self, lr_scale: float) -> None:
        """See `Placement.apply`."""
        for optimizer in self._optimizers.values():
            optimizer.prepare(lr_scale)
        for optimizer in self._optimizers.values():
            optimizer.step()
        self.skip()

    def skip(self) -> None:
        """See `Placement.skip`."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()

    def leads(self, hookpoint: str) -> bool:
        """See `Placement.leads`."""
        return True

    def whole(self, hookpoint: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """See `Placement.whole`."""
        optimizer = self._optimizers[hookpoint]
        return (optimizer.export(), optimizer.state()) if self.leads(hookpoint) else None

    def each_whole(self) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
        """See `Placement.each_whole`."""
        for hookpoint in self._saes:
            if (whole := self.whole(hookpoint)) is not None:
                yield (hookpoint, *whole)

    def whole_sae(self, hookpoint: str) -> Sae:
        """See `Placement.whole_sae`: its memory is the trained one's, unless the optimiser averages."""
        return around(self._optimizers[hookpoint].export(), **self._saes[hookpoint].sizes()).eval()

    def load(self, hookpoint: str, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """See `Placement.load`."""
        self._saes[hookpoint].load_state_dict(dict(weights))
        self._optimizers[hookpoint].load_state(state)

    def held_bytes(self) -> int:
        """See `Placement.held_bytes`."""
        parameters = [parameter for sae in self._saes.values() for parameter in sae.parameters()]
        gradients = [each.grad for each in parameters if each.grad is not None]
        deferred = [tensor for each in self._optimizers.values() for sums in each.deferred() for tensor in sums]
        states = [tensor for each in self._optimizers.values() for tensor in each.state().values()]
        held = {tensor.data_ptr(): tensor for tensor in (*parameters, *gradients, *deferred, *states)}
        return size_of(held.values())  # each once: some optimisers' state has the parameters in it

    def shard_bytes(self) -> int | None:
        """See `Placement.shard_bytes`."""
        return None


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of several tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
