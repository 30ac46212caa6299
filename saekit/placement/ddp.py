"""Every rank holds every SAE; gradients are summed over the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from saekit.placement.base import OptimizerFactory, SaeFactory
from saekit.placement.costs import FLOAT32, Costs, Traffic, Workload
from saekit.placement.local import LocalBank
from saekit.placement.replicas import checksum, send, strays, tensors_of
from saekit.placement.world import Ranked, World, start_world
from saekit.sae import Sae


class Ddp(Ranked, LocalBank):
    """Replicated parameters, gradients and optimizer states.

    A layer's gradients lie in one flat tensor, of which the parameters' `.grad` are views: they are summed in one
    call, without a copy, while the next layer computes, and only after the step's last micro-batch.
    """

    name = "ddp"
    title = "every process holds all SAEs"
    travels = "gradients"
    owns_gradient = False
    keeps_gradients = True

    def __init__(self, world: World) -> None:
        Ranked.__init__(self, world)
        LocalBank.__init__(self, world.device)
        self._gradients: dict[str, Tensor] = {}
        self._travelling: dict[str, dist.Work] = {}

    @classmethod
    def join(cls, layer_map: str | None = None) -> Ddp:
        """Meet the other ranks over gloo or NCCL."""
        return cls(start_world())

    @classmethod
    def traffic(cls, load: Workload, owned: int | None = None) -> Traffic:
        """Gradients, 4·P·L bytes, are all-reduced once, and so are the fired counts, int32 `[L, M]`."""
        each_layer = load.all_reduce(FLOAT32 * load.size.num_latents) + load.all_reduce(FLOAT32 * load.params)
        total = round(load.layers * each_layer)
        return Traffic(total, total)

    def place(self, hookpoints: Costs, make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """Make each SAE on one rank, which sends it to the others; make the optimizers and the flat gradients.

        Ranks fit initial weights at the same time, each those of its share of the layers.
        """
        made = {}
        for number, hookpoint in enumerate(hookpoints):
            made[hookpoint] = make_sae(hookpoint, blank=number % self.world_size != self.rank).to(self.device)
        for number, sae in enumerate(made.values()):
            send(tensors_of(sae), number % self.world_size)
        super().place(hookpoints, lambda hookpoint, *, blank=False: made[hookpoint], make_optimizer)
        self._gradients = {hookpoint: flat_gradient(sae) for hookpoint, sae in self._saes.items()}

    def strays(self) -> dict[str, list[int]]:
        """Compare checksums of the replicas: they take equal steps from equal weights, and should stay equal."""
        sums = torch.stack([checksum(tensors_of(sae)) for sae in self._saes.values()])
        of_ranks = zip(*self.gather(sums.tolist()), strict=True)
        return strays(dict(zip(self._saes, of_ranks, strict=True)))

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """Leave tokens where they are; after a layer's last backward pass its gradient begins to travel."""
        for hookpoint in list(acts):
            yield hookpoint, acts.pop(hookpoint)  # no reference stays here, so that the caller can free it
            if last:
                self._travelling[hookpoint] = dist.all_reduce(self._gradients[hookpoint], async_op=True)

    def travelling(self) -> bool:
        """Tell whether `route` has sent any: over several machines that can take longer than the backward passes."""
        return bool(self._travelling)

    def collect(self) -> dict[str, Tensor]:
        """Wait for the gradients that travel."""
        for hookpoint in self._gradients:
            self._travelling.pop(hookpoint).wait()
        return {hookpoint: gradient.sum() for hookpoint, gradient in self._gradients.items()}

    def skip(self) -> None:
        """Fill the flat gradients with zeros; the parameters' `.grad` stay, being views."""
        for gradient in self._gradients.values():
            gradient.zero_()


def flat_gradient(sae: Sae) -> Tensor:
    """One flat tensor of zeros that the gradients of all parameters are views of; autograd adds into it in place."""
    parameters = list(sae.parameters())
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=sae.device, dtype=sae.dtype)
    for parameter, piece in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    return flat
