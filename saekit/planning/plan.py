"""A run's plan: what each placement would need, which of them fit, and the one of those that moves least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from saekit.activations import (
    ModelShape,
    check_device,
    model_shape,
    resolve_ctx_len,
    resolve_dtype,
    select_layers,
)
from saekit.config import RunConfig
from saekit.errors import UserError
from saekit.placement.planner import PlacementName, Workload, balanced_map, resolve_map, traffic
from saekit.planning.bank import layer_cost, on_meta
from saekit.planning.language_model import LmCost, language_model_cost
from saekit.planning.machine import Machine
from saekit.planning.memory import Demand, Placing, RankMemory, rank_memory
from saekit.sae.kernels import SELECT_DTYPES, has_fast_bf16, has_fast_int8


@dataclass(frozen=True)
class Job:
    """A run, resolved as far as its cost goes."""

    cfg: RunConfig
    shape: ModelShape
    layers: tuple[int, ...]
    num_latents: int
    ctx_len: int
    dtype: torch.dtype
    """Of the language model."""
    backend: str
    """Kernels."""
    select_dtype: str
    machine: Machine
    lm: LmCost

    @property
    def tokens(self) -> int:
        """Per rank and micro-batch."""
        return self.cfg.train.batch_size * self.ctx_len

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.tokens * self.cfg.train.grad_acc_steps * self.machine.count


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

    @property
    def recommended(self) -> Choice | None:
        """Of those that fit the one with the least traffic, the simplest where several have none. None if none fits."""
        return min((choice for choice in self.choices if choice.fits), key=lambda choice: choice.sent, default=None)

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


def make_plan(cfg: RunConfig, machine: Machine) -> Plan:
    """Plan a run from the model's config alone; no weight and no data is read.

    Args:
        cfg: The run; its data set is not looked at.
        machine: Where it is to run.

    Raises:
        UserError: If the model's config cannot be read, or the configuration does not fit it.
    """
    job = make_job(cfg, machine)
    placements: tuple[Placing, ...] = ("single",) if machine.count == 1 else ("ddp", "layer-map", "zero3")
    return Plan(job, tuple(_choice(job, placement) for placement in placements if possible(cfg, placement)))


def possible(cfg: RunConfig, placement: Placing) -> bool:
    """Whether the other options leave that placement open."""
    train = cfg.train
    if train.shard_lm and placement != "zero3":
        return False
    if train.layer_map is not None and placement not in ("layer-map", "single"):
        return False
    return placement != "zero3" or train.optimizer in ("adam", "signum")


def make_job(cfg: RunConfig, machine: Machine) -> Job:
    """Resolve what the cost depends on.

    Raises:
        UserError: As `make_plan`.
    """
    train = cfg.train
    check_device(cfg.model, machine.device)
    shape = model_shape(cfg.model)
    layers = tuple(select_layers(shape.num_layers, train.layers, train.layer_stride))
    try:
        num_latents = train.sae.resolve_num_latents(shape.d_in)
    except ValueError as error:
        raise UserError(str(error)) from None
    ctx_len = resolve_ctx_len(cfg.data.ctx_len, shape.max_ctx_len)
    if machine.on_gpu:  # any that is sold today is fast at bfloat16; the machine need not be this one
        dtype = torch.bfloat16 if cfg.model.dtype == "auto" else getattr(torch, cfg.model.dtype)
        fast = "bf16"
    else:
        dtype = resolve_dtype(cfg.model.dtype, machine.device)
        fast = "bf16" if has_fast_bf16(machine.device) else "int8" if has_fast_int8(machine.device) else "fp32"
    backend = ("triton" if machine.on_gpu else "cpu") if train.kernels == "auto" else train.kernels
    select_dtype = fast if train.select_dtype == "auto" else train.select_dtype
    if backend == "eager":
        select_dtype = "fp32"
    lm = language_model_cost(
        shape,
        list(layers),
        batch_size=train.batch_size,
        ctx_len=ctx_len,
        dtype=dtype,
        in_8_bits=cfg.model.load_in_8bit,
        on_gpu=machine.on_gpu,
    )
    return Job(cfg, shape, layers, num_latents, ctx_len, dtype, backend, select_dtype, machine, lm)


def _choice(job: Job, placement: Placing) -> Choice:
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
    )


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
