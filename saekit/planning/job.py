"""Resolves what the cost of a run depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
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
from saekit.activations.sites import Site, common, hookpoints_of
from saekit.config import RunConfig
from saekit.errors import UserError
from saekit.placement.costs import Size
from saekit.planning.language_model import NO_MODEL, LmCost, language_model_cost, of_two_models
from saekit.planning.machine import Machine
from saekit.planning.meter import all_of, sized
from saekit.sae.kernels import auto_backend, check_select_dtype, likely_type
from saekit.sae.kernels.fastest import Work, fastest, remembered
from saekit.training.cached import cache_of, shape_in, sites_in
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
        rows = self.tokens * train.grad_acc_steps * train.mix
        return rows * self._width * self.dtype.itemsize if train.mix > 1 else 0

    @property
    def read_ahead(self) -> int:
        """Bytes of a rank's activations of two steps, which are in memory if a cache is read; 0 without one.

        With `--mix` nothing is read ahead.
        """
        train = self.cfg.train
        if train.activations is None or train.mix > 1:
            return 0
        return 2 * self.tokens * train.grad_acc_steps * self._width * self.dtype.itemsize

    @property
    def _width(self) -> int:
        """Return the sum of the widths of all hookpoints, each once."""
        return sum({part.name: part.width for each in self.units for part in each.site.parts}.values())

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
    read = _live(cfg, machine) if train.activations is None else _cached(cfg, train.activations, machine)
    auto = "triton" if machine.on_gpu else auto_backend(machine.device)
    backend = auto if train.kernels == "auto" else train.kernels
    try:
        units = tuple(UnitSize(each, train.sae.resolve_num_latents(each.d_in)) for each in read.sites)
        check_select_dtype(backend, train.select_dtype, machine.device)
    except ValueError as error:
        raise UserError(str(error)) from None
    fast = "bf16"
    if not machine.on_gpu:
        size = max(each.size for each in units)
        active = train.sae.kind(train.sae.k, size.num_latents).max_active
        work = Work(train.batch_size * read.ctx_len // train.micro_acc_steps, size.d_in, size.num_latents, active)
        seconds = remembered(backend, work)
        fast = fastest(seconds) if seconds else likely_type(machine.device)
    select_dtype = fast if train.select_dtype == "auto" else train.select_dtype
    if backend == "eager":
        select_dtype = "fp32"
    return Job(cfg, read.shape, units, read.ctx_len, read.dtype, backend, select_dtype, machine, read.lm)


class _Read(NamedTuple):
    """What gives a run its activations."""

    shape: ModelShape
    sites: tuple[Site, ...]
    ctx_len: int
    dtype: torch.dtype
    """Of the activations."""
    lm: LmCost


def _live(cfg: RunConfig, machine: Machine) -> _Read:
    """Resolve a run of the language model."""
    train = cfg.train
    shape = model_shape(cfg.model)
    other = None if cfg.other_model is None else model_shape(cfg.other_model)
    found = chosen(train, shape, other)
    shapes = [shape] if other is None else [shape, other]
    ctx_len = resolve_ctx_len(cfg.train.ctx_len, *(each.max_ctx_len for each in shapes))
    if machine.on_gpu:  # the GPU need not be in this machine, and all current GPUs are fast at bfloat16
        dtype = torch.bfloat16 if cfg.model.dtype == "auto" else getattr(torch, cfg.model.dtype)
    else:
        dtype = resolve_dtype(cfg.model.dtype, machine.device)
    own = names_in("", [each.name for each in found.hookpoints])
    lm = _cost(cfg, machine, shape, own, found.depth, ctx_len, dtype)
    if other is not None:
        tokens = train.batch_size * ctx_len
        widths = [each.width for each in found.hookpoints if not each.name.startswith(OTHER)]
        kept = all_of(sized(tokens * width * dtype.itemsize, machine.on_gpu) for width in widths)
        its = names_in(OTHER, [each.name for each in found.hookpoints])
        lm = of_two_models(lm, _cost(cfg, machine, other, its, found.other_depth, ctx_len, dtype), kept)
    return _Read(shape, found.sites, ctx_len, dtype, lm)


def _cached(cfg: RunConfig, activations: Path, machine: Machine) -> _Read:
    """Resolve a run on a cache: the language model is loaded for `--eval-every` only, and runs in no step."""
    folder, index = cache_of(cfg, activations)
    shape, sites, lm = shape_in(folder), sites_in(cfg, index, folder), NO_MODEL
    if cfg.train.eval_every is not None:
        names = [each.name for each in hookpoints_of(sites)]
        whole = _cost(cfg, machine, shape, names, index.depth, index.ctx_len, index.made_dtype)
        lm = replace(NO_MODEL, weights=whole.weights, small=whole.small, largest_module=whole.largest_module)
    return _Read(shape, sites, index.ctx_len, index.read_dtype, lm)


def _cost(
    cfg: RunConfig,
    machine: Machine,
    shape: ModelShape,
    hookpoints: list[str],
    depth: int,
    ctx_len: int,
    dtype: torch.dtype,
) -> LmCost:
    return language_model_cost(
        shape,
        hookpoints,
        depth,
        batch_size=cfg.train.batch_size,
        ctx_len=ctx_len,
        dtype=dtype,
        in_8_bits=cfg.model.load_in_8bit,
        on_gpu=machine.on_gpu,
        whole=cfg.train.loads_whole_model,
    )
