"""Every rank holds every SAE; gradients are summed over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from saekit.placement.base import OptimizerFactory, SaeFactory
from saekit.placement.local import LocalBank
from saekit.placement.world import Ranked, World
from saekit.sae import Sae


class Ddp(Ranked, LocalBank):
    """Replicated parameters, gradients and optimiser states. Implements `Placement`.

    A layer's gradients lie in one flat tensor, of which the parameters' `.grad` are views: they are summed in one
    call, without a copy, while the next layer computes, and only after the step's last micro-batch.
    """

    name = "ddp"
    alone = False

    def __init__(self, world: World) -> None:
        Ranked.__init__(self, world)
        LocalBank.__init__(self, world.device)
        self._gradients: dict[str, Tensor] = {}
        self._travelling: dict[str, dist.Work] = {}

    def place(self, hookpoints: Sequence[str], make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """See `Placement.place`."""
        super().place(hookpoints, make_sae, make_optimizer)
        self._gradients = {hookpoint: flat_gradient(sae) for hookpoint, sae in self._saes.items()}

    def leads(self, hookpoint: str) -> bool:
        """See `Placement.leads`: the layers' files are shared out among the ranks."""
        return list(self._saes).index(hookpoint) % self.world_size == self.rank

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """See `Placement.route`."""
        for hookpoint in list(acts):
            yield hookpoint, acts.pop(hookpoint)
            if last:
                self._travelling[hookpoint] = dist.all_reduce(self._gradients[hookpoint], async_op=True)

    def collect(self) -> dict[str, Tensor]:
        """See `Placement.collect`."""
        for hookpoint in self._gradients:
            self._travelling.pop(hookpoint).wait()
        return {hookpoint: gradient.sum() for hookpoint, gradient in self._gradients.items()}

    def skip(self) -> None:
        """See `Placement.skip`: the parameters' `.grad` stay, being views."""
        for gradient in self._gradients.values():
            gradient.zero_()

    def share(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Placement.share`."""
        return self.share_all(counts)


def flat_gradient(sae: Sae) -> Tensor:
    """One flat tensor of zeros that the gradients of all parameters are views of; autograd adds into it in place."""
    parameters = list(sae.parameters())
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=sae.device, dtype=sae.dtype)
    for parameter, piece in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    return flat
