"""A run's plan: what each placement would need, which of them fit, and the one of those to take."""

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
    """One placement of a job, seen from the rank that needs most."""

    placement: str
    """Its name."""
    ranks: int
    memory: RankMemory
    capacity: int
    """Bytes that the rank can have."""
    libraries: int
    """Bytes that it needs besides its tensors."""
    sent: int
    """Bytes that a rank sends or receives per optimizer step: the more of the two, on the rank where it is most."""
    layers_of_busiest: int
    """SAEs that the rank trains."""
    tokens_per_step: int
    """Of all ranks."""
    time: StepTime | None = None
    """Of an optimizer step; None where the machine's rates are not known."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks, if it is known."""
        return self.tokens_per_step / self.time.total if self.time else None

    @property
    def total(self) -> int:
        """Return bytes at the peak."""
        return self.memory.total + self.libraries

    @property
    def fits(self) -> bool:
        """Tell whether the rank has this much memory."""
        return self.total <= self.capacity


@dataclass(frozen=True)
class Plan:
    """Every placement of a job."""

    job: Job
    choices: tuple[Choice, ...]
    offload: Offload = NO_OFFLOAD
    """Under placements that can offload."""
    asked: str | None = None
    """The placement that the run will have, if that is decided."""

    @property
    def recommended(self) -> Choice | None:
        """Of those that fit the fastest, or where speeds are not known the one with the least traffic.

        The simplest of equals; None if none fits.
        """
        fitting = [choice for choice in self.choices if choice.fits]
        if all(choice.time for choice in fitting):
            return max(fitting, key=lambda choice: choice.tokens_per_second or 0, default=None)
        return min(fitting, key=lambda choice: choice.sent, default=None)

    @property
    def considered(self) -> tuple[Choice, ...]:
        """Return the choices that there are: all of them, or the one that was asked for."""
        return tuple(choice for choice in self.choices if self.asked in (None, choice.placement)) or self.choices

    @property
    def fits(self) -> bool:
        """Tell whether one of them does."""
        return any(choice.fits for choice in self.considered)

    def choice(self, placement: str) -> Choice:
        """Return the one with that placement.

        Raises:
            UserError: If this job has none such.
        """
        for choice in self.choices:
            if choice.placement == placement:
                return choice
        names = ", ".join(choice.placement for choice in self.choices)
        raise UserError(f"--placement {placement}: with {self.job.machine.count} ranks there is {names}")


def make_plan(cfg: RunConfig, machine: Machine, *, offload: Offload = NO_OFFLOAD, asked: str | None = None) -> Plan:
    """Plan a run from the model's config alone; no weight and no data is read.

    Args:
        cfg: The run; its data set is not read.
        machine: Where it is to run, and how fast that is, if it is known.
        offload: What placements that can offload keep in the machine's memory.
        asked: The placement that the run will have; by default what `cfg` says, if it says one.

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
        lm=job.lm,
        banks=tuple(banks[each.size] for each in job.units),
        on_gpu=machine.on_gpu,
        shard_lm=train.shard_lm,
        offload=offload if kind.offloads else NO_OFFLOAD,
    )
    # Where widths differ, the rank with the most to compute need not be the one with the most to send or to receive.
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
    """Compute the time of a step, if this machine's rates are known; offloading is not included."""
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
    """Compute it for the language model and as many units of one size."""
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
    """Pairs of a token and a latent per token, over the codes that are made of it: Multi-TopK has two."""
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
