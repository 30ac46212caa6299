"""Resolve a run from the configuration, the source and the ranks, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from saekit.activations.sites import Site, autoencoder, common, widths_of
from saekit.activations.source import Source
from saekit.config import RunConfig, TrainConfig
from saekit.config.run import to_flat
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.placement.costs import Size
from saekit.report import RunInfo
from saekit.runs.folder import run_folder
from saekit.runs.opening import OTHER_MODEL
from saekit.sae.kernels import SELECT_DTYPES, Kernels
from saekit.sae.kernels.fastest import Work
from saekit.training.agreed import agreed_kernels
from saekit.training.frame import needs_frame
from saekit.training.optimizers import base_lr, decays, rate_ratios
from saekit.training.schedule import dead_threshold, lr_scale, warmup_steps

Value = TypeVar("Value")


@dataclass(frozen=True)
class UnitPlan:
    """The resolved plan of one unit."""

    site: Site
    num_latents: int
    """M."""
    lr: float
    """The learning rate that warm-up rises to."""
    rate_ratios: tuple[float, float]
    """The learning rates of the decoder and of `b_enc`, divided by `lr`."""
    dead_threshold: int
    """Tokens without firing after which a latent is dead."""

    @classmethod
    def of(cls, cfg: TrainConfig, site: Site, source: Source) -> UnitPlan:
        """Resolve one unit of a run.

        Raises:
            ValueError: If the configuration does not fit the hookpoint's width.
        """
        num_latents = cfg.sae.resolve_num_latents(site.d_in)
        dead_after = dead_threshold(
            cfg.dead_feature_threshold,
            total_tokens=source.num_sequences * source.ctx_len,
            step_tokens=source.global_batch * source.ctx_len,
            num_latents=num_latents,
            k=cfg.sae.k,
        )
        rate = base_lr(cfg, num_latents, site.d_in)
        return cls(site, num_latents, rate, rate_ratios(cfg, site.d_in), dead_after)

    @property
    def name(self) -> str:
        """Return the name of the site."""
        return self.site.name

    @property
    def size(self) -> Size:
        """Return the size of the unit's coder."""
        return size_at(self.site, self.num_latents)

    def sizes(self, cfg: TrainConfig) -> dict[str, Any]:
        """Return the arguments for a fresh `Sae`."""
        return sizes_at(cfg, self.site, self.num_latents)

    def work(self, cfg: TrainConfig, tokens: int) -> Work:
        """Return the size of one call of the unit's encoder with `tokens` tokens."""
        return Work(tokens, self.site.d_in, self.num_latents, cfg.sae.kind(cfg.sae.k, self.num_latents).max_active)


@dataclass(frozen=True)
class RunPlan:
    """The resolved plan of a run: all defaults are filled in and all contradictions found."""

    cfg: TrainConfig
    units: tuple[UnitPlan, ...]
    """In model order."""
    source: Source
    kernels: Kernels
    """The kernels of all units."""
    run_dir: Path
    run: RunConfig | None
    """The whole run's configuration, if there is one."""

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Return the names of the units, in model order."""
        return tuple(each.name for each in self.units)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Return what each unit reads and writes."""
        return tuple(each.site for each in self.units)

    @property
    def coder(self) -> str:
        """Return the kind of the run's coders: SAE, transcoder or crosscoder."""
        return common(each.kind for each in self.sites)

    @property
    def costs(self) -> dict[str, float]:
        """Return what a step of each unit costs, see `costs_of`."""
        return costs_of({each.name: each.size for each in self.units})

    def unit(self, name: str) -> UnitPlan:
        """Return the plan of one unit."""
        return self.units[self.hookpoints.index(name)]

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of the whole run."""
        return self.source.num_steps

    @cached_property
    def warmup(self) -> int:
        """Return the optimizer steps of warm-up."""
        return warmup_steps(self.cfg.lr_warmup_steps, self.total_steps, decay=decays(self.cfg))

    def lr_scale(self, step: int) -> float:
        """Return the factor on every learning rate in optimizer step `step`, counted from 0."""
        return lr_scale(step, warmup=self.warmup, total_steps=self.total_steps, decay=decays(self.cfg))

    def config(self) -> dict[str, Any]:
        """Return the configuration as plain values without secrets. As `run.yaml` it starts the same run again."""
        source = self.source
        known = self.run.to_flat() if self.run else {"model": source.name, "dataset": source.data_name}
        values = {**known, **to_flat(self.cfg), "ctx_len": source.ctx_len, "run_name": self.run_dir.name}
        # These two say what to do with an existing folder, for one start only.
        return {name: value for name, value in values.items() if name not in ("overwrite", "resume")}

    def resolved(self) -> dict[str, Any]:
        """Return the resolved options: for each one value, or values by hookpoint if units differ.

        They are not part of `config`. There, a default learning rate would look as if the user had chosen it, and would
        also apply to other dictionary sizes.
        """
        return {
            "lr": self._of_units(lambda unit: unit.lr),
            "lr_warmup_steps": self.warmup,
            "decoder_lr_ratio": self._of_units(lambda unit: unit.rate_ratios[0]),
            "encoder_bias_lr_ratio": self._of_units(lambda unit: unit.rate_ratios[1]),
            "dead_feature_threshold": self._of_units(lambda unit: unit.dead_threshold),
            "num_latents": self._of_units(lambda unit: unit.num_latents),
            "d_in": self._of_units(lambda unit: unit.site.d_in),
            "d_out": self._of_units(lambda unit: unit.site.d_out),
            "global_batch": self.source.global_batch,
            "kernels": self.kernels.name,
            "select_dtype": self.select_dtype,
        }

    def _of_units(self, read: Callable[[UnitPlan], Value]) -> Value | dict[str, Value]:
        values = {unit.name: read(unit) for unit in self.units}
        return next(iter(values.values())) if len(set(values.values())) == 1 else values

    @property
    def select_dtype(self) -> str:
        """Return the precision in which candidates are selected, as `--select-dtype` names it."""
        return next(name for name, dtype in SELECT_DTYPES.items() if dtype == self.kernels.select_dtype)

    def place(self, step: int) -> dict[str, Any]:
        """Return the position in the data and the schedule after `step` optimizer steps, for a checkpoint's index."""
        source, lr = self.source, self.resolved()["lr"]
        scale = self.lr_scale(step - 1)
        return {
            "data": {
                "next_sequence": min(step * source.global_batch, source.num_sequences),
                "sequences": source.num_sequences,
                "checksum_of_last_step": source.checksum(step - 1),
                "read_options": dict(source.read_options),
                "cache": source.cache,
            },
            "schedule": {
                "lr": lr,
                "lr_of_last_step": self._of_units(lambda unit: unit.lr * scale),
                "warmup_steps": self.warmup,
                "total_steps": self.total_steps,
            },
            "seeds": {"init": self.cfg.init_seed, "data": self.cfg.order_seed},
        }

    def about(self) -> dict[str, Any]:
        """Return what a checkpoint says about its origin: model, data set and context length."""
        source = self.source
        other = {} if source.other_name is None else {OTHER_MODEL: source.other_name}
        return {"model": source.name, **other, "dataset": source.data_name, "ctx_len": source.ctx_len}

    def info(self, placement: Placement, start_step: int) -> RunInfo:
        """Return what reporters receive before the first step."""
        source = self.source
        return RunInfo(
            run_dir=self.run_dir,
            model=" and ".join(filter(None, (source.name, source.other_name))),
            dataset=source.data_name,
            hookpoints=self.hookpoints,
            widths=tuple(each.site.d_in for each in self.units),
            latents=tuple(each.num_latents for each in self.units),
            k=self.cfg.sae.k,
            total_steps=self.total_steps,
            total_sequences=source.num_sequences,
            ctx_len=source.ctx_len,
            start_step=start_step,
            device=str(placement.device),
            placement=placement.name,
            kernels=self.kernels.name,
            select_dtype=self.select_dtype,
            dtype=str(source.dtype).removeprefix("torch."),
            global_batch=source.global_batch,
            config=self.config(),
            world_size=placement.world_size,
            owners=placement.owners(),
            shard_bytes=placement.shard_bytes(),
            eval_every=self.cfg.eval_every,
            activation=self.cfg.sae.activation,
            with_auxk=self.cfg.auxk_alpha > 0,
            coder=self.coder,
        )


def costs_of(sizes: Mapping[str, Size]) -> dict[str, float]:
    """Return the relative cost of a step of each unit: the mean number of elements of its two matrices.

    Args:
        sizes: The units' sizes by name, in model order.
    """
    return {name: each.num_latents * (each.d_in + each.d_out) / 2 for name, each in sizes.items()}


def checked(cfg: Any) -> TrainConfig:
    """Return `cfg` if it is a `TrainConfig`.

    Raises:
        UserError: If it is not.
    """
    if not isinstance(cfg, TrainConfig):
        hint = ": pass its attribute `train`" if isinstance(cfg, RunConfig) else ""
        raise UserError(f"cfg is a {type(cfg).__name__}, but SaeTrainer takes a TrainConfig{hint}")
    return cfg


def plan_run(cfg: TrainConfig, source: Source, run: RunConfig | None, placement: Placement) -> RunPlan:
    """Resolve a run from `SaeTrainer`'s arguments. Collective.

    Raises:
        UserError: If the configuration does not fit the source.
    """
    source.begin(cfg, placement.device, placement.rank, placement.world_size)
    try:
        units = tuple(UnitPlan.of(cfg, site, source) for site in sites_of(cfg, source))
        run_dir = run_folder(cfg, default_run_name(source.name, run))
        tokens = placement.rows(cfg.batch_size * source.ctx_len, placement.world_size) // cfg.micro_acc_steps
        kernels = agreed_kernels(cfg, [unit.work(cfg, tokens) for unit in units], placement, run_dir)
    except ValueError as error:
        raise UserError(str(error)) from None
    return RunPlan(cfg=cfg, units=units, source=source, kernels=kernels, run_dir=run_dir, run=run)


def sites_of(cfg: TrainConfig, source: Source) -> tuple[Site, ...]:
    """Return the sites of a source: its own `sites`, or one SAE per hookpoint.

    Raises:
        UserError: If the configuration asks for other coders than SAEs and the source has no `sites`.
    """
    if source.sites is not None:
        return source.sites
    if cfg.coder != "SAE":
        raise UserError(f"{cfg.asked[0]} needs a source with `sites`, and {type(source).__name__} has none: train SAEs")
    return tuple(map(autoencoder, source.hookpoints))


def size_at(site: Site, num_latents: int) -> Size:
    """Return the size of a coder at a site."""
    return Size(num_latents, site.d_in, site.d_out, site.transcodes, not site.transcodes and needs_frame(site))


def sizes_at(cfg: TrainConfig, site: Site, num_latents: int) -> dict[str, Any]:
    """Return the arguments for a fresh `Sae` at a site."""
    sizes = cfg.sae.sizes(site.d_in, num_latents, site.d_out if site.transcodes else None)
    if needs_frame(site):
        sizes |= {"reads": widths_of(site.reads), "writes": widths_of(site.writes)}
    return sizes


def default_run_name(model_name: str, run: RunConfig | None) -> str:
    """Return a folder name made of the names of the models and the data set, such as `pythia-70m-fineweb`."""
    parts = [Path(model_name).name]
    if run is not None:
        parts += [Path(name).name for name in (run.train.crosscode_models,) if name is not None]
        parts.append(Path(run.data.dataset).name.split("*")[0])
    name = "-".join("".join(c if c.isalnum() or c in "-_." else "-" for c in part).strip("-.") for part in parts)
    return name.strip("-.") or "run"
