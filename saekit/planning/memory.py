"""The most memory that a rank needs at any moment of a run, under each placement: the sum of what is alive then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

from saekit.placement.planner import PlacementName
from saekit.planning.bank import LayerCost
from saekit.planning.language_model import LmCost
from saekit.planning.meter import NOTHING, Bytes, all_of, sized

Placing = Literal["single"] | PlacementName
BUCKET = 4_000_000
"""Bytes of DeepSpeed's buffer for gradients on their way (`saekit.placement.deepspeed.settings`)."""


@dataclass(frozen=True)
class Demand:
    """What the memory of a run depends on, besides where its SAEs live."""

    layers: int
    """SAEs that are trained (L)."""
    activations: int
    """Bytes of one layer's activations of a rank's micro-batch: tokens · D · bytes of the language model's type."""
    grad_acc_steps: int
    micro_acc_steps: int
    lm: LmCost
    bank: LayerCost
    """Of one layer, for chunks of the tokens that it trains on under this placement."""
    on_gpu: bool
    shard_lm: bool = False


@dataclass(frozen=True)
class Moment:
    """What is alive at one moment of an optimiser step."""

    name: str
    language_model: Bytes = NOTHING
    parameters: Bytes = NOTHING
    gradients: Bytes = NOTHING
    optimizer_state: Bytes = NOTHING
    activations: Bytes = NOTHING
    working: Bytes = NOTHING
    """What operations hold for a while, and counters."""

    @property
    def parts(self) -> dict[str, Bytes]:
        """By what they are for."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}

    @property
    def total(self) -> Bytes:
        """In all."""
        return all_of(self.parts.values())


@dataclass(frozen=True)
class RankMemory:
    """A rank's memory at the moment at which it needs most."""

    moments: tuple[Moment, ...]
    """What was compared."""

    @property
    def heap(self) -> int:
        """The most that the C library's heap has held at any moment, which it keeps."""
        return max(moment.total.kept for moment in self.moments)

    @property
    def peak(self) -> Moment:
        """The moment of the highest total."""
        return max(self.moments, key=lambda moment: moment.total.returned)

    @property
    def freed(self) -> int:
        """Bytes of the peak that nobody uses then: what the heap keeps."""
        return self.heap - self.peak.total.kept

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.peak.total.returned + self.heap


def rank_memory(placing: Placing, demand: Demand, world_size: int = 1, owned: int | None = None) -> RankMemory:
    """The memory of one rank.

    Args:
        placing: Where SAEs live.
        demand: The run. Under layer-map its `bank` is for chunks of all ranks' tokens.
        world_size: Ranks (W).
        owned: Layers that the rank trains, under layer-map; all of them otherwise.
    """
    bank, trained = demand.bank, demand.layers if owned is None else owned
    share = trained / (world_size if placing == "zero3" else 1)
    held = Moment(
        "between steps",
        language_model=demand.lm.weights,
        parameters=bank.parameters.times(share),
        optimizer_state=bank.state.times(share),
        working=bank.counters.times(trained),
    )
    if demand.shard_lm:
        whole = sized(demand.lm.largest_block, demand.on_gpu)
        held = replace(held, language_model=demand.lm.weights.times(1 / world_size) + whole)
    gradients = bank.gradients.times(share)
    if placing in ("ddp", "zero3"):  # theirs are kept from step to step; the others' are made by every step
        held = replace(held, gradients=gradients)
    moments = (
        _forward(demand, held, gradients),
        *_passes(placing, demand, held, trained, world_size),
        replace(_with(held, "optimiser's step", working=bank.update), gradients=gradients),
    )
    return RankMemory(moments)


def _forward(demand: Demand, held: Moment, gradients: Bytes) -> Moment:
    """The language model runs; its activations of all layers are there at its end, and one is copied after another.

    On a GPU the next step's forward pass is begun before the optimiser steps, when the gradients are still there.
    """
    one = sized(demand.activations, demand.on_gpu)
    captured = one.times(demand.layers)
    working = demand.lm.forward.most(captured + one) - captured
    if demand.on_gpu or demand.grad_acc_steps > 1:
        held = replace(held, gradients=gradients)
    return _with(held, "the language model's forward pass", activations=captured, working=working)


def _passes(placing: Placing, demand: Demand, held: Moment, trained: int, world_size: int) -> Iterator[Moment]:
    """The first and the last layer of a micro-batch: activations go as gradients come."""
    bank, one = demand.bank, sized(demand.activations, demand.on_gpu)
    for number in sorted({0, max(0, trained - 1)} if trained else ()):
        there = held
        if demand.grad_acc_steps > 1 and not held.gradients.total:  # of another micro-batch
            there = replace(held, gradients=bank.gradients.times(trained))
        working = bank.later_chunk if there.gradients.total or demand.micro_acc_steps > 1 else bank.first_chunk
        if not there.gradients.total:
            there = replace(held, gradients=bank.gradients.times(number + 1))
        if placing == "zero3":  # the layer at work is whole
            working = working + bank.parameters + bank.gradients + sized(BUCKET, demand.on_gpu)
        activations = one.times(demand.layers - number)
        if placing == "layer-map":
            activations = _on_their_way(demand, number, trained, world_size)
        yield _with(there, f"layer {number + 1} of {trained}", activations=activations, working=working)


def _on_their_way(demand: Demand, wave: int, waves: int, world_size: int) -> Bytes:
    """Activations under layer-map while a wave trains: its own, the next wave's on its way, and those still to go."""
    arrived = sized(world_size * demand.activations, demand.on_gpu)
    left = demand.layers - (wave + 1) * world_size
    if wave + 1 >= waves or left <= 0:
        return arrived
    leaving = sized(min(world_size, left) * demand.activations, demand.on_gpu)
    still = sized(demand.activations, demand.on_gpu).times(max(0, left - world_size))
    return arrived + arrived + leaving + still


def _with(held: Moment, name: str, activations: Bytes = NOTHING, working: Bytes = NOTHING) -> Moment:
    return replace(held, name=name, activations=held.activations + activations, working=held.working + working)
