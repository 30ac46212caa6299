"""Resolves what the cost of a run depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from saekit.activations import (
    ModelShape,
    check_device,
    model_shape,
    resolve_ctx_len,
    resolve_dtype,
)
from saekit.activations.chosen import chosen
from saekit.activations.hookpoints import OTHER
from saekit.activations.pair import names_in
from saekit.activations.sites import Site, common
from saekit.config import RunConfig
from saekit.errors import UserError
from saekit.placement.costs import Size
from saekit.planning.language_model import LmCost, language_model_cost, of_two_models
from saekit.planning.machine import Machine
from saekit.planning.meter import all_of, sized
from saekit.sae.kernels import auto_backend, check_select_dtype, likely_type
from saekit.sae.kernels.fastest import Work, fastest, remembered
from saekit.training.plan import costs_of, size_at


class UnitSize(NamedTuple):
    """One coder of a run."""

    site: Site
    num_latents: int
    """M."""

    @property
    def size(self) -> Size:
        """Return the coder's size."""
        return size_at(self.site, self.num_latents)


@dataclass(frozen=True)
class Job:
    """The units and the batches of a run."""

    cfg: RunConfig
    shape: ModelShape
    units: tuple[UnitSize, ...]
    """In model order."""
    ctx_len: int
    dtype: torch.dtype
    """The type of the language model's weights and activations."""
    backend: str
    """The name of the kernels."""
    select_dtype: str
    """The type in which candidates are selected."""
    machine: Machine
    lm: LmCost

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the numbers of the blocks that units belong to, ascending."""
        return tuple(sorted({part.layer for each in self.units for part in each.site.writes if part.layer is not None}))

    @property
    def sizes(self) -> dict[str, Size]:
        """Return the size of each unit, by name in model order."""
        return {each.site.name: each.size for each in self.units}

    @property
    def coder(self) -> str:
        """Return the kind of the run's coders: SAE, transcoder or crosscoder."""
        return common(each.site.kind for each in self.units)

    @property
    def costs(self) -> dict[str, float]:
        """Return the relative cost of a step of each unit, by hookpoint."""
        return costs_of(self.sizes)

    @property
    def tokens(self) -> int:
        """Return the tokens per rank and micro-batch."""
        return self.cfg.train.batch_size * self.ctx_len

    @property
    def mixed(self) -> int:
        """Return the bytes of a rank's activations that `--mix` keeps, once per hookpoint; 0 without the option."""
        train = self.cfg.train
        widths = {part.name: part.width for each in self.units for part in each.site.parts}
        rows = self.tokens * train.grad_acc_steps * train.mix
        return rows * sum(widths.values()) * self.dtype.itemsize if train.mix > 1 else 0

    @property
    def tokens_per_step(self) -> int:
        """Return the tokens per optimizer step, over all ranks."""
        return self.tokens * self.cfg.train.grad_acc_steps * self.machine.count


def make_job(cfg: RunConfig, machine: Machine) -> Job:
    """Resolve a run for planning.

    Args:
        cfg: The run.
        machine: Where it will run.

    Raises:
        UserError: As `make_plan`.
    """
    train = cfg.train
    check_device(cfg.model, machine.device)
    shape = model_shape(cfg.model)
    other = None if cfg.other_model is None else model_shape(cfg.other_model)
    found = chosen(train, shape, other)
    auto = "triton" if machine.on_gpu else auto_backend(machine.device)
    backend = auto if train.kernels == "auto" else train.kernels
    try:
        units = tuple(UnitSize(each, train.sae.resolve_num_latents(each.d_in)) for each in found.sites)
        check_select_dtype(backend, train.select_dtype, machine.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    shapes = [shape] if other is None else [shape, other]
    ctx_len = resolve_ctx_len(cfg.train.ctx_len, *(each.max_ctx_len for each in shapes))
    if machine.on_gpu:  # the GPU need not be in this machine, and all current GPUs are fast at bfloat16
        dtype = torch.bfloat16 if cfg.model.dtype == "auto" else getattr(torch, cfg.model.dtype)
        fast = "bf16"
    else:
        dtype = resolve_dtype(cfg.model.dtype, machine.device)
        size = max(each.size for each in units)
        active = train.sae.kind(train.sae.k, size.num_latents).max_active
        work = Work(train.batch_size * ctx_len // train.micro_acc_steps, size.d_in, size.num_latents, active)
        seconds = remembered(backend, work)
        fast = fastest(seconds) if seconds else likely_type(machine.device)
    select_dtype = fast if train.select_dtype == "auto" else train.select_dtype
    if backend == "eager":
        select_dtype = "fp32"

    def cost_of(model: ModelShape, prefix: str, depth: int) -> LmCost:
        return language_model_cost(
            model,
            names_in(prefix, [each.name for each in found.hookpoints]),
            depth,
            batch_size=train.batch_size,
            ctx_len=ctx_len,
            dtype=dtype,
            in_8_bits=cfg.model.load_in_8bit,
            on_gpu=machine.on_gpu,
            whole=train.loads_whole_model,
        )

    lm = cost_of(shape, "", found.depth)
    if other is not None:
        tokens = train.batch_size * ctx_len
        widths = [each.width for each in found.hookpoints if not each.name.startswith(OTHER)]
        kept = all_of(sized(tokens * width * dtype.itemsize, machine.on_gpu) for width in widths)
        lm = of_two_models(lm, cost_of(other, OTHER, found.other_depth), kept)
    return Job(cfg, shape, units, ctx_len, dtype, backend, select_dtype, machine, lm)
