"""Plans a run: what each placement needs, which placements fit, and which one to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saekit.activations.held import stays_on_device
from saekit.config import RunConfig, SaeConfig
from saekit.config.ranks import AUTO
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.placement.choose import kind_of, kinds
from saekit.placement.costs import Size, Workload
from saekit.planning.bank import layer_cost, on_meta
from saekit.planning.job import Job, make_job
from saekit.planning.machine import Machine
from saekit.planning.memory import NO_OFFLOAD, Demand, Offload, RankMemory, rank_memory
from saekit.planning.rates import optimizer_key
from saekit.planning.speed import StepTime, StepWork, step_time
from saekit.sae.kernels import SELECT_DTYPES


@dataclass(frozen=True)
class Choice:
    """A job under one placement, as seen from the busiest rank."""

    placement: str
    """The placement's name."""
    ranks: int
    """The number of ranks."""
    memory: RankMemory
    """The memory of the rank's tensors."""
    capacity: int
    """Bytes that the rank can use."""
    libraries: int
    """Bytes that the rank needs in addition to its tensors."""
    sent: int
    """The larger of the bytes that a rank sends and receives per optimizer step, on the rank where it is largest."""
    layers_of_busiest: int
    """SAEs that the rank trains."""
    tokens_per_step: int
    """Tokens per optimizer step, over all ranks."""
    time: StepTime | None = None
    """The time of an optimizer step; None if the machine's rates are not known."""

    @property
    def tokens_per_second(self) -> float | None:
        """Return the tokens per second over all ranks; None if unknown."""
        return self.tokens_per_step / self.time.total if self.time else None

    @property
    def total(self) -> int:
        """Return the rank's bytes at the peak."""
        return self.memory.total + self.libraries

    @property
    def fits(self) -> bool:
        """Tell whether the rank has enough memory."""
        return self.total <= self.capacity


@dataclass(frozen=True)
class Plan:
    """A job under every placement."""

    job: Job
    choices: tuple[Choice, ...]
    offload: Offload = NO_OFFLOAD
    """What placements that can offload keep in the machine's memory."""
    asked: str | None = None
    """The placement of the run, if it is decided."""

    @property
    def recommended(self) -> Choice | None:
        """Return the fastest placement that fits, or the one with the least traffic if speeds are unknown.

        Of equals, the simplest. None if no placement fits.
        """
        fitting = [choice for choice in self.choices if choice.fits]
        if all(choice.time for choice in fitting):
            return max(fitting, key=lambda choice: choice.tokens_per_second or 0, default=None)
        return min(fitting, key=lambda choice: choice.sent, default=None)

    @property
    def considered(self) -> tuple[Choice, ...]:
        """Return the requested placement, or all of them if none was requested."""
        return tuple(choice for choice in self.choices if self.asked in (None, choice.placement)) or self.choices

    @property
    def fits(self) -> bool:
        """Tell whether any of the considered placements fits."""
        return any(choice.fits for choice in self.considered)

    def choice(self, placement: str) -> Choice:
        """Return the choice with that placement.

        Raises:
            UserError: If the job cannot run under that placement.
        """
        for choice in self.choices:
            if choice.placement == placement:
                return choice
        names = ", ".join(choice.placement for choice in self.choices)
        raise UserError(
            f"--placement {placement} is not possible with {self.job.machine.count} ranks: choose one of {names}"
        )


def make_plan(cfg: RunConfig, machine: Machine, *, offload: Offload = NO_OFFLOAD, asked: str | None = None) -> Plan:
    """Plan a run from the model's config alone, without reading weights or data.

    Args:
        cfg: The run.
        machine: The machine of the run, with its rates if they are known.
        offload: What placements that can offload keep in the machine's memory.
        asked: The placement of the run. By default, the placement in `cfg`, if it names one.

    Raises:
        UserError: If the model's config cannot be read, or the configuration does not fit it.
    """
    job = make_job(cfg, machine)
    choices = tuple(_choice(job, kind, offload) for kind in kinds(machine.count) if kind.supports(cfg.train) is None)
    if asked is None and cfg.train.placement != AUTO and kind_of(cfg.train.placement).ranked == (machine.count > 1):
        asked = cfg.train.placement
    return Plan(job, choices, offload, asked)


def _choice(job: Job, kind: type[Placement], offload: Offload) -> Choice:
    train, machine = job.cfg.train, job.machine
    ranks = machine.count
    costs = job.costs
    everywhere = dict.fromkeys(kind.holds(rank, costs, ranks, train.layer_map) for rank in range(ranks))
    busiest = max(everywhere, key=lambda held: sum(costs[name] for name in held))
    owned = [number for number, name in enumerate(costs) if name in busiest]
    tokens = kind.rows(job.tokens, ranks)
    banks = {
        size: layer_cost(
            train,
            size,
            -(-tokens // train.micro_acc_steps),
            job.dtype,
            on_meta(job.backend, SELECT_DTYPES[job.select_dtype]),
            on_gpu=machine.on_gpu,
            owns_gradient=kind.owns_gradient,
        )
        for size in {each.size for each in job.units}
    }
    demand = Demand(
        activations=tuple(job.tokens * each.size.width * job.dtype.itemsize for each in job.units),
        grad_acc_steps=train.grad_acc_steps,
        micro_acc_steps=train.micro_acc_steps,
        mixed=0 if train.mix_in == "disk" else job.mixed,
        mixed_away=machine.on_gpu and not stays_on_device(train.mix_in, job.mixed, machine.memory),
        read_ahead=job.read_ahead,
        lm=job.lm,
        banks=tuple(banks[each.size] for each in job.units),
        on_gpu=machine.on_gpu,
        shard_lm=train.shard_lm,
        offload=offload if kind.offloads else NO_OFFLOAD,
    )
    # If widths differ, the rank that computes most need not be the rank that sends or receives most.
    sent = max(_sent(job, kind, [job.sizes[name] for name in held]) for held in everywhere)
    return Choice(
        placement=kind.name,
        ranks=ranks,
        memory=rank_memory(kind, demand, ranks, owned),
        capacity=machine.capacity,
        libraries=machine.libraries,
        sent=sent,
        layers_of_busiest=len(owned),
        tokens_per_step=job.tokens_per_step,
        time=_time(job, kind, owned, sent),
    )


def _time(job: Job, kind: type[Placement], owned: Sequence[int], sent: int) -> StepTime | None:
    """Compute the time of a step without offloading; None if the machine's rates are not known."""
    sizes = [job.units[number].size for number in owned]
    parts = [_time_of(job, kind, size, sizes.count(size), sent) for size in dict.fromkeys(sizes)]
    if not parts or None in parts:
        return None
    known = [part for part in parts if part is not None]
    return StepTime(
        known[0].language_model,
        sum(part.passes for part in known),
        sum(part.update for part in known),
        known[0].network,
    )


def _time_of(job: Job, kind: type[Placement], size: Size, count: int, sent: int) -> StepTime | None:
    """Compute the time of a step for the language model and `count` units of one size."""
    train, ranks = job.cfg.train, job.machine.count
    if job.machine.rates is None:
        return None
    params = size.params(train.sae.skip_connection)
    work = StepWork(
        tokens=job.tokens,
        micro_batches=train.grad_acc_steps,
        chunks=train.micro_acc_steps,
        trained=kind.rows(job.tokens, ranks),
        layers=count,
        d_in=size.d_in,
        d_out=size.d_out,
        num_latents=size.num_latents,
        k=_width_of_codes(train.sae, size.num_latents),
        lm_operations=job.lm.flops_per_token,
        lm_blocks=job.lm.blocks,
        lm_width=job.shape.d_in,
        lm_type="fp32" if job.dtype.itemsize == 4 else "bf16",
        kernels=job.backend,
        select_type=job.select_dtype,
        optimizer=optimizer_key(train.optimizer, train.moments_dtype),
        params_held=params // kind.parts(ranks),
        sent=sent,
        ranks=ranks,
        sharing=1 if job.machine.on_gpu else ranks,
        whole_layers_travel=kind.travels == "activations",
    )
    return step_time(work, job.machine.rates)


def _width_of_codes(sae: SaeConfig, num_latents: int) -> int:
    """Return K summed over the codes of a token: Multi-TopK makes two codes."""
    selection = sae.kind(sae.k, num_latents)
    return selection.max_active + (selection.wider().max_active if sae.multi_topk else 0)


def _sent(job: Job, kind: type[Placement], held: Sequence[Size]) -> int:
    sizes = list(job.sizes.values())
    moved = []
    for size in dict.fromkeys(sizes):
        load = Workload(
            layers=sizes.count(size),
            size=size,
            world_size=job.machine.count,
            tokens=job.tokens * job.cfg.train.grad_acc_steps,
            micro_batches=job.cfg.train.grad_acc_steps,
            chunks=job.cfg.train.micro_acc_steps,
            act_bytes=job.dtype.itemsize,
            backend="nccl" if job.machine.on_gpu else "gloo",
            skip=job.cfg.train.sae.skip_connection,
        )
        moved.append(kind.traffic(load, held.count(size)))
    return max(sum(each.sent for each in moved), sum(each.received for each in moved))
