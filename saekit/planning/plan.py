"""A run's plan: what each placement would need, which of them fit, and the one of those to take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from saekit.config import RunConfig, SaeConfig
from saekit.errors import UserError
from saekit.placement.planner import PlacementName, Workload, balanced_map, resolve_map, traffic
from saekit.planning.bank import layer_cost, on_meta
from saekit.planning.job import Job, make_job
from saekit.planning.machine import Machine
from saekit.planning.memory import NO_OFFLOAD, Demand, Offload, Placing, RankMemory, rank_memory
from saekit.planning.rates import optimizer_key
from saekit.planning.speed import StepTime, StepWork, step_time
from saekit.sae.kernels import SELECT_DTYPES


@dataclass(frozen=True)
class Choice:
    """One placement of a job, seen from the rank that needs most."""

    placement: Placing
    ranks: int
    memory: RankMemory
    capacity: int
    """Bytes that the rank can have."""
    libraries: int
    """Bytes that it needs besides its tensors."""
    sent: int
    """Bytes that it sends per optimiser step, about what it receives."""
    layers_of_busiest: int
    """SAEs that the rank trains."""
    tokens_per_step: int
    """Of all ranks."""
    time: StepTime | None = None
    """Of an optimiser step; None where the machine's rates are not known."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks, if it is known."""
        return self.tokens_per_step / self.time.total if self.time else None

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.memory.total + self.libraries

    @property
    def fits(self) -> bool:
        """Whether the rank has so much."""
        return self.total <= self.capacity


@dataclass(frozen=True)
class Plan:
    """Every placement of a job."""

    job: Job
    choices: tuple[Choice, ...]
    offload: Offload = NO_OFFLOAD
    """Under zero3."""
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
        """The choices that there are: all of them, or the one that was asked for."""
        return tuple(choice for choice in self.choices if self.asked in (None, choice.placement)) or self.choices

    @property
    def fits(self) -> bool:
        """Whether one of those does."""
        return any(choice.fits for choice in self.considered)

    def choice(self, placement: str) -> Choice:
        """The one with that placement.

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
        cfg: The run; its data set is not looked at.
        machine: Where it is to run, and how fast that is, if it is known.
        offload: What zero3 keeps in the machine's memory.
        asked: The placement that the run will have; by default what `cfg` says, if it says one.

    Raises:
        UserError: If the model's config cannot be read, or the configuration does not fit it.
    """
    job = make_job(cfg, machine)
    placements: tuple[Placing, ...] = ("single",) if machine.count == 1 else ("ddp", "layer-map", "zero3")
    choices = tuple(_choice(job, placement, offload) for placement in placements if possible(cfg, placement))
    if asked is None and cfg.train.placement != "auto" and machine.count > 1:
        asked = cfg.train.placement
    return Plan(job, choices, offload, asked)


def possible(cfg: RunConfig, placement: Placing) -> bool:
    """Whether the other options leave that placement open."""
    train = cfg.train
    if train.shard_lm and placement != "zero3":
        return False
    if train.layer_map is not None and placement not in ("layer-map", "single"):
        return False
    return placement != "zero3" or train.optimizer in ("adam", "signum")


def _choice(job: Job, placement: Placing, offload: Offload) -> Choice:
    train, machine = job.cfg.train, job.machine
    ranks = machine.count
    owned = max(_owned(job, ranks)) if placement == "layer-map" else None
    tokens = job.tokens * (ranks if placement == "layer-map" else 1)
    bank = layer_cost(
        train,
        job.shape.d_in,
        job.num_latents,
        -(-tokens // train.micro_acc_steps),
        job.dtype,
        on_meta(job.backend, SELECT_DTYPES[job.select_dtype]),
        on_gpu=machine.on_gpu,
        alone=placement in ("single", "layer-map"),
    )
    demand = Demand(
        layers=len(job.layers),
        activations=job.tokens * job.shape.d_in * job.dtype.itemsize,
        grad_acc_steps=train.grad_acc_steps,
        micro_acc_steps=train.micro_acc_steps,
        lm=job.lm,
        bank=bank,
        on_gpu=machine.on_gpu,
        shard_lm=train.shard_lm,
        offload=offload,
    )
    sent = 0 if placement == "single" else _sent(job, placement, owned)
    return Choice(
        placement=placement,
        ranks=ranks,
        memory=rank_memory(placement, demand, ranks, owned),
        capacity=machine.capacity,
        libraries=machine.libraries,
        sent=sent,
        layers_of_busiest=len(job.layers) if owned is None else owned,
        tokens_per_step=job.tokens_per_step,
        time=_time(job, placement, owned, sent),
    )


def _time(job: Job, placement: Placing, owned: int | None, sent: int) -> StepTime | None:
    """How long a step will take, if this machine's rates are known; what is offloaded is not in it."""
    train, ranks = job.cfg.train, job.machine.count
    if job.machine.rates is None:
        return None
    params = 2 * job.num_latents * job.shape.d_in + job.num_latents + job.shape.d_in
    work = StepWork(
        tokens=job.tokens,
        micro_batches=train.grad_acc_steps,
        chunks=train.micro_acc_steps,
        trained=job.tokens * (ranks if placement == "layer-map" else 1),
        layers=len(job.layers) if owned is None else owned,
        d_in=job.shape.d_in,
        num_latents=job.num_latents,
        k=_width_of_codes(train.sae, job.num_latents),
        lm_operations=job.lm.flops_per_token,
        lm_blocks=job.lm.blocks,
        lm_type="fp32" if job.dtype.itemsize == 4 else "bf16",
        kernels=job.backend,
        select_type=job.select_dtype,
        optimizer=optimizer_key(train.optimizer, train.moments_dtype),
        params_held=params // (ranks if placement == "zero3" else 1),
        sent=sent,
        ranks=ranks,
        sharing=1 if job.machine.on_gpu else ranks,
        whole_layers_travel=placement == "layer-map",
    )
    return step_time(work, job.machine.rates)


def _width_of_codes(sae: SaeConfig, num_latents: int) -> int:
    """Pairs of a token and a latent per token, over the codes that are made of it: Multi-TopK has two."""
    selection = sae.kind(sae.k, num_latents)
    return selection.max_active + (selection.wider().max_active if sae.multi_topk else 0)


def _owned(job: Job, ranks: int) -> Iterator[int]:
    names = [str(layer) for layer in job.layers]
    owners = balanced_map(names, ranks)
    if job.cfg.train.layer_map is not None:
        owners = resolve_map(job.cfg.train.layer_map, job.layers, names, ranks)
    return (list(owners.values()).count(rank) for rank in range(ranks))


def _sent(job: Job, placement: PlacementName, owned: int | None) -> int:
    load = Workload(
        layers=len(job.layers),
        d_in=job.shape.d_in,
        num_latents=job.num_latents,
        world_size=job.machine.count,
        tokens=job.tokens * job.cfg.train.grad_acc_steps,
        micro_batches=job.cfg.train.grad_acc_steps,
        chunks=job.cfg.train.micro_acc_steps,
        act_bytes=job.dtype.itemsize,
        backend="nccl" if job.machine.on_gpu else "gloo",
    )
    moved = traffic(placement, load, owned or 0)
    return max(moved.sent, moved.received)
