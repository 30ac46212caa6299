"""The placement layer-map: each unit is on one rank, and activations travel to it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from saekit.errors import UserError
from saekit.placement.base import OptimizerFactory, SaeFactory
from saekit.placement.costs import Costs, Traffic, Workload
from saekit.placement.local import LocalBank
from saekit.placement.world import Ranked, World, start_world
from saekit.sae import Sae
from saekit.sae.model import around, without_memory
from saekit.sae.storage import layer_number

Wave = dict[int, str]
"""At most one hookpoint per owner, by rank."""


class LayerMap(Ranked, LocalBank):
    """Sends a layer's tokens from all ranks to the layer's owner, and only there.

    Layers travel in waves of one layer per owner, so that all owners compute at the same time. A wave travels while
    the previous one computes, and at most two waves are in memory.

    Args:
        world: The ranks.
        layer_map: `--layer-map`; None balances the layers.
    """

    name = "layer-map"
    title = "each holds some layers' SAEs"
    travels = "activations"
    takes_layer_map = True

    def __init__(self, world: World, layer_map: str | None = None) -> None:
        Ranked.__init__(self, world)
        LocalBank.__init__(self, world.device)
        self.layer_map = layer_map
        self._owners: dict[str, int] = {}
        self._waves: list[Wave] = []

    @classmethod
    def join(cls, layer_map: str | None = None) -> LayerMap:
        """Meet the other ranks over gloo or NCCL."""
        return cls(start_world(), layer_map)

    @classmethod
    def holds(cls, rank: int, hookpoints: Costs, world_size: int, layer_map: str | None = None) -> tuple[str, ...]:
        """Return the hookpoints that a rank owns, by the map or balanced."""
        owners = resolve_map(layer_map, hookpoints, world_size)
        return tuple(name for name in hookpoints if owners[name] == rank)

    @classmethod
    def rows(cls, tokens: int, world_size: int) -> int:
        """Return the tokens of all ranks, since an owner sees all of them."""
        return tokens * world_size

    @classmethod
    def in_flight(cls, number: int, owned: int, layers: int, world_size: int) -> tuple[int, ...]:
        """Return what has arrived for this wave, the next wave (received and sent), and the layers still to be sent."""
        left = layers - (number + 1) * world_size
        if number + 1 >= owned or left <= 0:
            return (world_size,)
        return (world_size, world_size, min(world_size, left), *(1,) * max(0, left - world_size))

    @classmethod
    def traffic(cls, load: Workload, owned: int | None = None) -> Traffic:
        """Count activations: N·D sent for every layer of other owners, (W - 1)·N·D received for each own layer.

        An owner sees every token, so statistics need not be summed over ranks.
        """
        activations = load.tokens * load.size.width * load.act_bytes
        own = load.layers if owned is None else owned
        return Traffic((load.layers - own) * activations, (load.world_size - 1) * own * activations)

    def place(self, hookpoints: Costs, make_sae: SaeFactory, make_optimizer: OptimizerFactory) -> None:
        """Make the SAEs that this rank owns."""
        self._owners = resolve_map(self.layer_map, hookpoints, self.world_size)
        held = [[name for name in hookpoints if self._owners[name] == rank] for rank in range(self.world_size)]
        self._waves = [
            {rank: hookpoint for rank, hookpoint in enumerate(row) if hookpoint is not None}
            for row in zip_longest(*held)
        ]
        super().place({name: hookpoints[name] for name in held[self.rank]}, make_sae, make_optimizer)

    def leader(self, hookpoint: str) -> int:
        """Return the owner."""
        return self._owners[hookpoint]

    def owners(self) -> dict[str, int]:
        """Return the owner of every layer, as mapped by `place`."""
        return dict(self._owners)

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """Send each wave to its owners while they train on the previous wave."""
        # Ranks drop different numbers of excluded tokens, so each says how many rows it sends.
        tokens = next(iter(acts.values())).shape[0]
        rows = [count for (count,) in self.exchange([tokens])]

        coming = [self._send(acts, self._waves[0], tokens, rows)]
        for number, wave in enumerate(self._waves):
            arrived, work = coming.pop()
            work.wait()
            del work  # it holds the tensors that were sent
            if number + 1 < len(self._waves):
                coming.append(self._send(acts, self._waves[number + 1], tokens, rows))
            if self.rank in wave:
                yield wave[self.rank], arrived

    def _send(self, acts: dict[str, Tensor], wave: Wave, tokens: int, rows: list[int]) -> tuple[Tensor, dist.Work]:
        """Start to send one wave. D may differ within a wave, and there may be no rows at all.

        Returns:
            The tensor that has arrived once the work is done: the activations of this rank's unit, `[sum(rows), D]` in
            rank order, or `[0]` if this rank has no unit in the wave.
        """
        widths = {owner: acts[wave[owner]].shape[1] for owner in sorted(wave)}
        leaving = torch.cat([acts.pop(wave[owner]).flatten() for owner in widths])
        send = [tokens * widths.get(owner, 0) for owner in range(self.world_size)]
        receive = [count * widths.get(self.rank, 0) for count in rows]
        arrived = leaving.new_empty(sum(receive))
        work = dist.all_to_all_single(arrived, leaving, receive, send, async_op=True)
        return (arrived.view(sum(rows), widths[self.rank]) if self.rank in wave else arrived), work

    def counted(self, mask_N: Tensor) -> Tensor:
        """Return all ranks' masks in rank order, the order in which rows arrive: `[W · N]`."""
        together = mask_N.new_empty(self.world_size, len(mask_N))
        dist.all_gather(list(together), mask_N)
        return together.view(-1)

    @torch.no_grad()
    def whole_sae(self, hookpoint: str) -> Sae:
        """Broadcast the SAE from its owner."""
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

    def share(self, counts: Tensor) -> Tensor:
        """Return the counts as they are, since the owner has seen every token."""
        return counts


def balanced_map(hookpoints: Costs, world_size: int) -> dict[str, int]:
    """Assign an owner to every hookpoint, so that the busiest rank has as little to do as possible.

    Equal costs give contiguous blocks whose sizes differ by at most one, larger blocks first. Otherwise layers are
    assigned in order of decreasing cost, each to the rank with the least cost so far. The busiest rank then has at most
    4/3 of the optimum (Graham 1969, longest processing time first).

    Args:
        hookpoints: The cost of each, in model order.
        world_size: The number of ranks. If there are fewer hookpoints, the last ranks get none.

    Returns:
        The owner's rank by hookpoint, in model order.

    Raises:
        ValueError: If `world_size` is below 1.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}, but there must be at least one rank")
    if len(set(hookpoints.values())) < 2:
        size, longer = divmod(len(hookpoints), world_size)
        owners = [rank for rank in range(world_size) for _ in range(size + (rank < longer))]
        return dict(zip(hookpoints, owners, strict=True))
    load = [0.0] * world_size
    owner = {}
    for name in sorted(hookpoints, key=lambda each: -hookpoints[each]):  # stable: equal costs stay in model order
        rank = load.index(min(load))
        owner[name] = rank
        load[rank] += hookpoints[name]
    return {name: owner[name] for name in hookpoints}


def parse_map(text: str) -> dict[int, int]:
    """Parse a layer map such as `0-5:0,6-11:1` into ranks by layer number. Ranges include their end.

    Raises:
        UserError: If the text does not have this form, or names a layer twice.
    """
    owner: dict[int, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?:([0-9]{1,5})\s*", part)
        if found is None:
            raise UserError(f"--layer-map {text!r}: {part!r} should be layers and their rank, as in 0-5:0,6-11:1")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise UserError(f"--layer-map {text!r}: the range of {part.strip()!r} is empty; write {last}-{first}")
        for layer in range(first, last + 1):
            if layer in owner:
                raise UserError(f"--layer-map {text!r} names layer {layer} twice: give each layer one rank")
            owner[layer] = int(found[3])
    return owner


def resolve_map(text: str | None, hookpoints: Costs, world_size: int) -> dict[str, int]:
    """Return the owner of every hookpoint: as `--layer-map` says, or balanced without it.

    Under `--layer-map`, all hookpoints of a layer have the same owner.

    Args:
        text: The value of `--layer-map`; None if it was not given.
        hookpoints: The cost of each trained hookpoint, in model order.
        world_size: The number of ranks.

    Raises:
        UserError: If the text cannot be read or does not fit the hookpoints or the ranks.
    """
    if text is None:
        return balanced_map(hookpoints, world_size)
    owner = parse_map(text)
    layers = {}
    for name in hookpoints:
        if (number := layer_number(name)) is None:
            raise UserError(
                f"--layer-map {text!r} maps layer numbers, but {name} has none: leave it out for a balanced map"
            )
        layers[name] = number
    if missing := sorted(set(layers.values()) - set(owner)):
        raise UserError(f"--layer-map {text!r} gives no rank for {_layers(missing)}: every trained layer needs one")
    if surplus := sorted(set(owner) - set(layers.values())):
        raise UserError(f"--layer-map {text!r} names {_layers(surplus)}, not trained in this run: see --layers")
    if (highest := max(owner.values())) >= world_size:
        raise UserError(
            f"--layer-map {text!r} names rank {highest}, but the last of {world_size} ranks is {world_size - 1}"
        )
    return {name: owner[layer] for name, layer in layers.items()}


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
