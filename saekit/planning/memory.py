"""The most memory that a rank needs at any moment of a run, under each placement: the sum of what is alive then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from saekit.placement import Placement
from saekit.planning.bank import LayerCost
from saekit.planning.language_model import LmCost
from saekit.planning.meter import NOTHING, Bytes, all_of, sized

PREFETCH = 50_000_000
"""Elements that DeepSpeed gathers ahead (its default `stage3_prefetch_bucket_size`)."""


class Offload(NamedTuple):
    """The tensors that an offloading placement keeps in the machine's memory instead of the GPU's."""

    optimizer: bool = False
    """The optimizer's state, the gradients, and the weights that it steps."""
    parameters: bool = False


NO_OFFLOAD = Offload()


@dataclass(frozen=True)
class Demand:
    """The quantities that a run's memory depends on, besides the placement."""

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
    offload: Offload = NO_OFFLOAD
    """`NO_OFFLOAD` where the placement cannot offload."""


@dataclass(frozen=True)
class Moment:
    """The tensors that are alive at one moment of an optimizer step."""

    name: str
    language_model: Bytes = NOTHING
    parameters: Bytes = NOTHING
    gradients: Bytes = NOTHING
    optimizer_state: Bytes = NOTHING
    activations: Bytes = NOTHING
    working: Bytes = NOTHING
    """Temporary tensors of operations, and counters."""

    @property
    def parts(self) -> dict[str, Bytes]:
        """By what they are for."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}

    @property
    def total(self) -> Bytes:
        """Return the total."""
        return all_of(self.parts.values())


@dataclass(frozen=True)
class RankMemory:
    """A rank's memory at the moment at which it needs most."""

    moments: tuple[Moment, ...]
    """The moments that were compared."""
    host: int = 0
    """Offloaded bytes, in the machine's memory."""

    @property
    def heap(self) -> int:
        """Return the most that the C library's heap has held at any moment, which it keeps."""
        return max(moment.total.kept for moment in self.moments)

    @property
    def peak(self) -> Moment:
        """Return the moment of the highest total."""
        return max(self.moments, key=lambda moment: moment.total.returned)

    @property
    def freed(self) -> int:
        """Unused bytes at the peak, which the heap keeps."""
        return self.heap - self.peak.total.kept

    @property
    def total(self) -> int:
        """Return bytes at the peak."""
        return self.peak.total.returned + self.heap


def rank_memory(kind: type[Placement], demand: Demand, world_size: int, owned: int) -> RankMemory:
    """Return the memory of one rank.

    Args:
        kind: Where SAEs live.
        demand: The run; its `bank` is for chunks of as many tokens as `kind.rows` says.
        world_size: Ranks (W).
        owned: Layers whose SAEs the rank holds, whole or in part.
    """
    bank, share = demand.bank, owned / kind.parts(world_size)
    held = Moment(
        "between steps",
        language_model=demand.lm.weights,
        parameters=bank.parameters.times(share),
        optimizer_state=bank.state.times(share),
        working=bank.counters.times(owned),
    )
    if demand.shard_lm:
        held = replace(held, language_model=_sharded(demand, world_size))
    gradients, update, host = bank.gradients.times(share), bank.update, 0
    if demand.offload.optimizer:
        gradients = gradients.times(2)  # DeepSpeed keeps those that it sums up and those that the optimizer reads
    if demand.on_gpu:  # on a CPU what is offloaded stays where it was
        offload, shards, state = demand.offload, held.parameters, held.optimizer_state
        host = shards.total if any(offload) else 0
        if all(offload):  # if only parameters were offloaded, the optimizer would have a copy on the GPU
            held = replace(held, parameters=NOTHING)
        if offload.optimizer:
            host += gradients.total + state.total
            held, gradients, update = replace(held, optimizer_state=NOTHING), NOTHING, NOTHING
    if kind.keeps_gradients:
        held = replace(held, gradients=gradients)
    moments = (
        _forward(demand, held, gradients),
        *_passes(kind, demand, held, owned, world_size),
        replace(_with(held, "optimizer's step", working=update), gradients=gradients),
    )
    return RankMemory(moments, host)


def _sharded(demand: Demand, world_size: int) -> Bytes:
    """Return a language model that is cut among the ranks, at the moment at which most of it is whole.

    A module's tensors are gathered before it runs, and those of the modules after it up to `PREFETCH` elements.
    """
    lm = demand.lm
    large = lm.weights - lm.small
    gathered = min(large.total, lm.largest_module + PREFETCH * lm.element)
    return lm.weights.times(1 / world_size) + lm.small + sized(gathered, demand.on_gpu)


def _forward(demand: Demand, held: Moment, gradients: Bytes) -> Moment:
    """The language model runs; its activations of all layers are there at its end, and one is copied after another.

    On a GPU the next step's forward pass is begun before the optimizer steps, when the gradients are still there.
    """
    one = sized(demand.activations, demand.on_gpu)
    captured = one.times(demand.layers)
    working = demand.lm.forward.most(captured + one) - captured
    if demand.on_gpu or demand.grad_acc_steps > 1:
        held = replace(held, gradients=gradients)
    return _with(held, "the language model's forward pass", activations=captured, working=working)


def _passes(kind: type[Placement], demand: Demand, held: Moment, trained: int, world_size: int) -> Iterator[Moment]:
    """Yield the first and the last layer of a micro-batch: activations go as gradients come."""
    bank = demand.bank
    made_anew = not kind.keeps_gradients
    for number in sorted({0, max(0, trained - 1)} if trained else ()):
        there = held
        if demand.grad_acc_steps > 1 and made_anew:  # of another micro-batch
            there = replace(held, gradients=bank.gradients.times(trained))
        later = not made_anew or demand.grad_acc_steps > 1 or demand.micro_acc_steps > 1
        working = bank.later_chunk if later else bank.first_chunk
        if made_anew and demand.grad_acc_steps == 1:
            there = replace(held, gradients=bank.gradients.times(number + 1))
        if kind.gathers:  # the layer at work is whole
            working = working + bank.parameters + bank.gradients
        if kind.buffer_bytes:
            working = working + sized(kind.buffer_bytes, demand.on_gpu)
        tensors = kind.in_flight(number, trained, demand.layers, world_size)
        activations = all_of(sized(times * demand.activations, demand.on_gpu) for times in tensors)
        yield _with(there, f"layer {number + 1} of {trained}", activations=activations, working=working)


def _with(held: Moment, name: str, activations: Bytes = NOTHING, working: Bytes = NOTHING) -> Moment:
    return replace(held, name=name, activations=held.activations + activations, working=held.working + working)
