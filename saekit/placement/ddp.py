"""The placement ddp: every rank holds every SAE, and gradients are summed over the ranks."""

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
    """Replicates parameters, gradients and optimizer states on every rank.

    A layer's gradients are in one flat tensor, and the parameters' `.grad` are views of it. One call sums them over
    ranks without a copy, while the next layer computes. This happens once per step, after its last micro-batch.
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
        """Count one all-reduce of the gradients, 4·P·L bytes, and one of the fired counts, int32 `[L, M]`."""
        each_layer = load.all_reduce(FLOAT32 * load.size.num_latents) + load.all_reduce(FLOAT32 * load.params)
        total = round(load.layers * each_layer)
        return Traffic(total, total)

    def place(self, hookpoints: Costs, make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """Make each SAE on one rank and broadcast it, then make the optimizers and the flat gradients.

        Each rank fits the initial weights of its share of the layers, at the same time as the others.
        """
        made = {}
        for number, hookpoint in enumerate(hookpoints):
            made[hookpoint] = make_sae(hookpoint, blank=number % self.world_size != self.rank).to(self.device)
        for number, sae in enumerate(made.values()):
            send(tensors_of(sae), number % self.world_size)
        super().place(hookpoints, lambda hookpoint, *, blank=False: made[hookpoint], make_optimizer)
        self._gradients = {hookpoint: flat_gradient(sae) for hookpoint, sae in self._saes.items()}

    def strays(self) -> dict[str, list[int]]:
        """Compare checksums of the replicas, which start equal and take equal steps, so they should stay equal."""
        sums = torch.stack([checksum(tensors_of(sae)) for sae in self._saes.values()])
        of_ranks = zip(*self.gather(sums.tolist()), strict=True)
        return strays(dict(zip(self._saes, of_ranks, strict=True)))

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield the tokens as they are. After a layer's last backward pass, start to sum its gradient over ranks."""
        for hookpoint in list(acts):
            yield hookpoint, acts.pop(hookpoint)  # keeps no reference, so the caller can free the tensor
            if last:
                self._travelling[hookpoint] = dist.all_reduce(self._gradients[hookpoint], async_op=True)

    def travelling(self) -> bool:
        """Tell whether gradients travel. Over several machines this can take longer than the backward passes."""
        return bool(self._travelling)

    def collect(self) -> dict[str, Tensor]:
        """Wait for the sums of the gradients."""
        for hookpoint in self._gradients:
            self._travelling.pop(hookpoint).wait()
        return {hookpoint: gradient.sum() for hookpoint, gradient in self._gradients.items()}

    def skip(self) -> None:
        """Fill the flat gradients with zeros. The parameters' `.grad` stay views of them."""
        for gradient in self._gradients.values():
            gradient.zero_()


def flat_gradient(sae: Sae) -> Tensor:
    """Make a flat tensor of zeros and set all parameters' `.grad` to views of it. Autograd adds to them in place."""
    parameters = list(sae.parameters())
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=sae.device, dtype=sae.dtype)
    for parameter, piece in zip(parameters, flat.split([each.numel() for each in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    return flat
