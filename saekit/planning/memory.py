"""The peak memory of a rank under each placement: the largest sum of live tensors over the moments of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
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
    """The optimizer's state, the gradients, and the master weights."""
    parameters: bool = False


NO_OFFLOAD = Offload()


@dataclass(frozen=True)
class Demand:
    """The quantities that a run's memory depends on, in addition to the placement."""

    activations: tuple[int, ...]
    """By unit, in model order: bytes of its activations in a rank's micro-batch (tokens · D · bytes per number)."""
    grad_acc_steps: int
    micro_acc_steps: int
    mixed: int
    """Bytes of activations that wait for their step (`--mix`)."""
    mixed_away: bool
    """Whether these are in the machine's memory although there is a GPU."""
    read_ahead: int
    """Bytes of activations that a thread reads from a cache ahead of the training, in the machine's memory."""
    lm: LmCost
    banks: tuple[LayerCost, ...]
    """By unit, the cost for a chunk of the tokens that it trains on under this placement."""
    on_gpu: bool
    shard_lm: bool = False
    offload: Offload = NO_OFFLOAD
    """`NO_OFFLOAD` if the placement cannot offload."""


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
        """Return the bytes by purpose."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}

    @property
    def total(self) -> Bytes:
        """Return the total."""
        return all_of(self.parts.values())


@dataclass(frozen=True)
class RankMemory:
    """A rank's memory over the moments of a step."""

    moments: tuple[Moment, ...]
    """The moments that are compared."""
    host: int = 0
    """Bytes in the machine's memory although there is a GPU: offloaded tensors, or activations mixed or read ahead."""

    @property
    def heap(self) -> int:
        """Return the size of the C library's heap: the most that it has held at any moment, since it never shrinks."""
        return max(moment.total.kept for moment in self.moments)

    @property
    def peak(self) -> Moment:
        """Return the moment of the highest total."""
        return max(self.moments, key=lambda moment: moment.total.returned)

    @property
    def freed(self) -> int:
        """Return the unused bytes of the heap at the peak."""
        return self.heap - self.peak.total.kept

    @property
    def total(self) -> int:
        """Return the bytes at the peak."""
        return self.peak.total.returned + self.heap


def rank_memory(kind: type[Placement], demand: Demand, world_size: int, owned: Sequence[int]) -> RankMemory:
    """Return the memory of one rank.

    Args:
        kind: The placement.
        demand: The run. Its `banks` are for chunks of the tokens that `kind.rows` returns.
        world_size: The number of ranks (W).
        owned: The numbers of the units that the rank holds, whole or in part, in model order.
    """
    banks, share = [demand.banks[number] for number in owned], 1 / kind.parts(world_size)
    held = Moment(
        "between steps",
        language_model=demand.lm.weights,
        parameters=all_of(bank.parameters for bank in banks).times(share),
        optimizer_state=all_of(bank.state for bank in banks).times(share),
        activations=_waiting(demand),
        working=all_of(bank.counters for bank in banks),
    )
    if demand.shard_lm:
        held = replace(held, language_model=_sharded(demand, world_size))
    gradients = all_of(bank.gradients for bank in banks).times(share)
    host = demand.mixed if demand.mixed_away else 0
    host += demand.read_ahead if demand.on_gpu else 0
    update = _most(bank.update for bank in banks)
    if demand.offload.optimizer:
        gradients = gradients.times(2)  # DeepSpeed keeps one copy to sum into and one for the optimizer
    if demand.on_gpu:  # on a CPU, offloading moves nothing
        offload, shards, state = demand.offload, held.parameters, held.optimizer_state
        host += shards.total if any(offload) else 0
        if all(offload):  # with only parameters offloaded, the optimizer keeps a copy on the GPU
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


def _waiting(demand: Demand) -> Bytes:
    """Return the activations of other steps that are in the same memory as those of this step."""
    mixed = NOTHING if demand.mixed_away else sized(demand.mixed, demand.on_gpu)
    return mixed if demand.on_gpu else mixed + sized(demand.read_ahead, on_gpu=False)


def _sharded(demand: Demand, world_size: int) -> Bytes:
    """Return the bytes of a sharded language model at the moment when most of it is gathered.

    DeepSpeed gathers a module's tensors before it runs, and up to `PREFETCH` elements of the modules after it.
    """
    lm = demand.lm
    large = lm.weights - lm.small
    gathered = min(large.total, lm.largest_module + PREFETCH * lm.element)
    return lm.weights.times(1 / world_size) + lm.small + sized(gathered, demand.on_gpu)


def _forward(demand: Demand, held: Moment, gradients: Bytes) -> Moment:
    """Return the moment of the language model's forward pass, or of reading a cache.

    At its end, the activations of all layers are in memory, and they are copied one by one. On a GPU, the next step's
    forward pass starts before the optimizer's step, while the gradients are still in memory.
    """
    sizes = [sized(each, demand.on_gpu) for each in demand.activations]
    captured, one = all_of(sizes), _most(sizes)
    working = demand.lm.forward.maximum(captured + one) - captured
    if demand.on_gpu or demand.grad_acc_steps > 1:
        held = replace(held, gradients=gradients)
    name = "the language model's forward pass" if demand.lm.blocks else "taking the activations"
    return _with(held, name, activations=captured, working=working)


def _passes(
    kind: type[Placement], demand: Demand, held: Moment, owned: Sequence[int], world_size: int
) -> Iterator[Moment]:
    """Yield the passes of the first, the largest and the last unit of a micro-batch.

    From unit to unit, activations are freed and gradients are added.
    """
    banks = [demand.banks[number] for number in owned]
    allocated_each_step, trained = not kind.keeps_gradients, len(owned)
    largest = max(range(trained), key=lambda number: banks[number].later_chunk.total, default=0)
    for number in sorted({0, largest, trained - 1} if trained else ()):
        there, bank = held, banks[number]
        if demand.grad_acc_steps > 1 and allocated_each_step:  # gradients of an earlier micro-batch
            there = replace(held, gradients=all_of(each.gradients for each in banks))
        later = not allocated_each_step or demand.grad_acc_steps > 1 or demand.micro_acc_steps > 1
        working = bank.later_chunk if later else bank.first_chunk
        if allocated_each_step and demand.grad_acc_steps == 1:
            there = replace(held, gradients=all_of(each.gradients for each in banks[: number + 1]))
        if kind.gathers:  # the layer that computes is whole
            working = working + bank.parameters + bank.gradients
        if kind.buffer_bytes:
            working = working + sized(kind.buffer_bytes, demand.on_gpu)
        activations = _in_flight(kind.in_flight(number, trained, len(demand.banks), world_size), demand)
        yield _with(there, f"layer {number + 1} of {trained}", activations=activations, working=working)


def _in_flight(tensors: Sequence[int], demand: Demand) -> Bytes:
    """Return the bytes of activations that a rank holds while it trains a unit.

    Tensors of one unit's size belong to the last units, which are still to come. Larger ones can belong to any unit, so
    they are counted with the widest unit's size.

    Args:
        tensors: What `Questions.in_flight` returned.
        demand: The run.
    """
    waiting = [times for times in tensors if times == 1]
    several = [times * max(demand.activations) for times in tensors if times > 1]
    to_come = demand.activations[len(demand.activations) - len(waiting) :]
    return all_of(sized(size, demand.on_gpu) for size in (*several, *to_come))


def _most(sizes: Iterable[Bytes]) -> Bytes:
    """Return the maximum of each kind of bytes."""
    return reduce(Bytes.maximum, sizes, NOTHING)


def _with(held: Moment, name: str, activations: Bytes = NOTHING, working: Bytes = NOTHING) -> Moment:
    return replace(held, name=name, activations=held.activations + activations, working=held.working + working)
