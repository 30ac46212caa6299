"""Each layer's SAE lives whole on one rank; activations travel to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from saekit.placement.base import OptimizerFactory, SaeFactory
from saekit.placement.local import LocalBank
from saekit.placement.planner import resolve_map
from saekit.placement.world import Ranked, World
from saekit.sae import Sae
from saekit.sae.model import around, without_memory

Wave = dict[int, str]
"""At most one hookpoint for each owner."""


class LayerMap(Ranked, LocalBank):
    """A layer's tokens of all ranks go to its owner, and only there. Implements `Placement`.

    Layers travel in waves of one layer per owner, so that owners work at the same time; a wave is on its way while
    the one before it computes, and no more than two are in memory.

    Args:
        world: The ranks.
        layer_map: As in `--layer-map`; None balances the layers.
    """

    name = "layer-map"

    def __init__(self, world: World, layer_map: str | None = None) -> None:
        Ranked.__init__(self, world)
        LocalBank.__init__(self, world.device)
        self.layer_map = layer_map
        self._owners: dict[str, int] = {}
        self._waves: list[Wave] = []

    def place(self, hookpoints: Sequence[str], make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """See `Placement.place`."""
        numbers = [int(hookpoint.rpartition(".")[2]) for hookpoint in hookpoints]
        self._owners = resolve_map(self.layer_map, numbers, hookpoints, self.world_size)
        held = [[name for name in hookpoints if self._owners[name] == rank] for rank in range(self.world_size)]
        self._waves = [
            {rank: hookpoint for rank, hookpoint in enumerate(row) if hookpoint is not None}
            for row in zip_longest(*held)
        ]
        super().place(held[self.rank], make_sae, make_optimizer)

    def leads(self, hookpoint: str) -> bool:
        """See `Placement.leads`."""
        return self._owners[hookpoint] == self.rank

    def owners(self) -> dict[str, int]:
        """See `Placement.owners`."""
        return dict(self._owners)

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """See `Placement.route`."""
        # Ranks drop other numbers of special tokens, so each says how many rows it sends.
        tokens = next(iter(acts.values())).shape[0]
        rows = self.gather(tokens)

        coming = [self._send(acts, self._waves[0], tokens, rows)]
        for number, wave in enumerate(self._waves):
            arrived, work = coming.pop()
            work.wait()
            del work  # which holds what was sent
            if number + 1 < len(self._waves):
                coming.append(self._send(acts, self._waves[number + 1], tokens, rows))
            if self.rank in wave:
                yield wave[self.rank], arrived

    def _send(self, acts: dict[str, Tensor], wave: Wave, tokens: int, rows: list[int]) -> tuple[Tensor, dist.Work]:
        """Start one wave; what arrives is this rank's layer, `[sum(rows), D]` in rank order, once the work is done."""
        leaving = torch.cat([acts.pop(wave[owner]) for owner in sorted(wave)])
        send = [tokens if owner in wave else 0 for owner in range(self.world_size)]
        receive = rows if self.rank in wave else [0] * self.world_size
        arrived = leaving.new_empty(sum(receive), leaving.shape[1])
        return arrived, dist.all_to_all_single(arrived, leaving, receive, send, async_op=True)

    @torch.no_grad()
    def whole_sae(self, hookpoint: str) -> Sae:
        """See `Placement.whole_sae`: the owner sends it to the others."""
        owner = self._owners[hookpoint]
        mine = super().whole_sae(hookpoint) if owner == self.rank else None
        sizes = self.gather(mine.sizes() if mine is not None else None)[owner]
        if mine is not None:
            tensors = {name: parameter.detach() for name, parameter in mine.named_parameters()}
        else:
            parameters = without_memory(**sizes).named_parameters()
            tensors = {name: torch.empty_like(parameter, device=self.device) for name, parameter in parameters}
        for tensor in tensors.values():
            dist.broadcast(tensor, src=owner)
        return around(tensors, **sizes).eval()

    def share(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Placement.share`: the owner has seen every token."""
        return counts
