"""What follows from the configuration, the model and the data, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.activations import context_length, excluded_tokens, find_blocks, resolve_ctx_len, select_layers
from saekit.activations.hookpoints import text_config_of, width
from saekit.config import RunConfig, TrainConfig
from saekit.config.run import to_flat
from saekit.data import StepBatches, sequences
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.report import RunInfo
from saekit.sae.kernels import SELECT_DTYPES, Kernels, auto_backend, choose_kernels
from saekit.training.optimizers import base_lr, decays, rate_ratios
from saekit.training.run_folder import run_folder
from saekit.training.schedule import dead_threshold, lr_scale, warmup_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunPlan:
    """One run, resolved: every default filled in, every contradiction found."""

    cfg: TrainConfig
    layers: tuple[int, ...]
    """Layer numbers, ascending."""
    hookpoints: tuple[str, ...]
    """Their names, in the same order."""
    d_in: int
    num_latents: int
    kernels: Kernels
    """What computes the SAEs."""
    batches: StepBatches
    excluded: Tensor
    """int64: ids of the tokens that do not train the SAEs."""
    model_name: str
    dataset_name: str
    run_dir: Path
    source: RunConfig | None

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.batches.num_steps

    @property
    def ctx_len(self) -> int:
        """Tokens per sequence."""
        return self.batches.data.ctx_len

    @cached_property
    def warmup(self) -> int:
        """Optimiser steps of warm-up."""
        return warmup_steps(self.cfg.lr_warmup_steps, self.total_steps, decay=decays(self.cfg))

    @cached_property
    def dead_threshold(self) -> int:
        """Tokens without firing after which a latent is dead."""
        return dead_threshold(
            self.cfg.dead_feature_threshold,
            total_tokens=self.batches.num_sequences * self.ctx_len,
            step_tokens=self.batches.global_batch * self.ctx_len,
            num_latents=self.num_latents,
            k=self.cfg.sae.k,
        )

    @cached_property
    def base_lr(self) -> float:
        """The learning rate that warm-up rises to."""
        return base_lr(self.cfg, self.num_latents, self.d_in)

    def lr_scale(self, step: int) -> float:
        """Factor on `base_lr` in optimiser step `step`, which counts from 0."""
        return lr_scale(step, warmup=self.warmup, total_steps=self.total_steps, decay=decays(self.cfg))

    def kept(self, input_ids: Tensor) -> Tensor:
        """Which tokens train the SAEs: bool, of the shape of `input_ids`, on the CPU."""
        return ~torch.isin(input_ids, self.excluded)

    def config(self) -> dict[str, Any]:
        """The whole configuration as plain values, without secrets; as `run.yaml` it starts the same run again."""
        known = self.source.to_flat() if self.source else {"model": self.model_name, "dataset": self.dataset_name}
        values = {**known, **to_flat(self.cfg), "ctx_len": self.ctx_len, "run_name": self.run_dir.name}
        # What to do with an existing folder was said for this time only.
        return {name: value for name, value in values.items() if name not in ("overwrite", "resume")}

    def resolved(self) -> dict[str, Any]:
        """What the defaults that depend on something else came to.

        Kept apart from `config`: written there, a learning rate for one dictionary would look like the user's wish
        for the next.
        """
        to_decoder, to_biases = rate_ratios(self.cfg, self.d_in)
        return {
            "lr": self.base_lr,
            "lr_warmup_steps": self.warmup,
            "decoder_lr_ratio": to_decoder,
            "encoder_bias_lr_ratio": to_biases,
            "dead_feature_threshold": self.dead_threshold,
            "num_latents": self.num_latents,
            "d_in": self.d_in,
            "global_batch": self.batches.global_batch,
            "kernels": self.kernels.name,
            "select_dtype": self.select_dtype,
        }

    @property
    def select_dtype(self) -> str:
        """In what precision candidates are found, as `--select-dtype` names it."""
        return next(name for name, dtype in SELECT_DTYPES.items() if dtype == self.kernels.select_dtype)

    def place(self, step: int) -> dict[str, Any]:
        """Where a run stands after `step` optimiser steps, in the data and in the schedule."""
        batches = self.batches
        return {
            "data": {
                "next_sequence": min(step * batches.global_batch, batches.num_sequences),
                "sequences": batches.num_sequences,
                "checksum_of_last_step": batches.checksum(step - 1),
            },
            "schedule": {
                "lr": self.base_lr,
                "lr_of_last_step": self.base_lr * self.lr_scale(step - 1),
                "warmup_steps": self.warmup,
                "total_steps": self.total_steps,
            },
            "seeds": {"init": self.cfg.init_seed, "data": self.cfg.data_seed if self.cfg.shuffle else None},
        }

    def about(self) -> dict[str, Any]:
        """What a checkpoint says of its origin."""
        return {
            "model": self.model_name,
            "dataset": self.dataset_name,
            "ctx_len": self.ctx_len,
            "dead_feature_threshold": self.dead_threshold,
        }

    def info(self, placement: Placement, dtype: torch.dtype, start_step: int) -> RunInfo:
        """What reporters are told before the first step."""
        return RunInfo(
            run_dir=self.run_dir,
            model=self.model_name,
            dataset=self.dataset_name,
            hookpoints=self.hookpoints,
            d_in=self.d_in,
            num_latents=self.num_latents,
            k=self.cfg.sae.k,
            total_steps=self.total_steps,
            total_sequences=self.batches.num_sequences,
            ctx_len=self.ctx_len,
            start_step=start_step,
            device=str(placement.device),
            placement=placement.name,
            kernels=self.kernels.name,
            select_dtype=self.select_dtype,
            dtype=str(dtype).removeprefix("torch."),
            global_batch=self.batches.global_batch,
            config=self.config(),
            world_size=placement.world_size,
            owners=placement.owners(),
            shard_bytes=placement.shard_bytes(),
            eval_every=self.cfg.eval_every,
            activation=self.cfg.sae.activation,
            with_auxk=self.cfg.auxk_alpha > 0,
        )


def plan_run(
    cfg: TrainConfig,
    dataset: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: RunConfig | None,
    placement: Placement,
) -> RunPlan:
    """Resolve a run; the arguments are `SaeTrainer`'s.

    Raises:
        UserError: If the configuration does not fit the model or the data.
    """
    blocks = find_blocks(model)
    layers = select_layers(len(blocks.modules), cfg.layers, cfg.layer_stride)
    d_in = width(text_config_of(model.config))
    try:
        num_latents = cfg.sae.resolve_num_latents(d_in)
        backend = _one_backend(placement) if cfg.kernels == "auto" else cfg.kernels
        kernels = choose_kernels(backend, cfg.select_dtype, placement.device)
    except ValueError as error:
        raise UserError(str(error)) from None

    data = sequences(dataset, cfg.ctx_len)
    resolve_ctx_len(data.ctx_len, context_length(model.config))
    batches = StepBatches(
        data,
        cfg.batch_size * cfg.grad_acc_steps * placement.world_size,
        cfg.data_seed if cfg.shuffle else None,
        cfg.max_tokens,
    )
    model_name = source.model.model if source else model.name_or_path or type(model).__name__
    dataset_name = source.data.dataset if source else "tokenised data"
    return RunPlan(
        cfg=cfg,
        layers=tuple(layers),
        hookpoints=tuple(blocks.hookpoint(layer) for layer in layers),
        d_in=d_in,
        num_latents=num_latents,
        kernels=kernels,
        batches=batches,
        excluded=torch.tensor(excluded_tokens(cfg, model, tokenizer), dtype=torch.int64),
        model_name=model_name,
        dataset_name=dataset_name,
        run_dir=run_folder(cfg, default_run_name(model_name, source)),
        source=source,
    )


def default_run_name(model_name: str, source: RunConfig | None) -> str:
    """A folder name such as `pythia-70m-fineweb`, made of the model's and the data set's."""
    parts = [Path(model_name).name] + ([Path(source.data.dataset).name.split("*")[0]] if source else [])
    name = "-".join("".join(c if c.isalnum() or c in "-_." else "-" for c in part).strip("-.") for part in parts)
    return name.strip("-.") or "run"


def _one_backend(placement: Placement) -> str:
    """The kernels of all ranks, which step replicas of the same SAEs: where one has no compiler, torch's for all."""
    wanted = set(placement.gather(auto_backend(placement.device)))
    return wanted.pop() if len(wanted) == 1 else "cpu"
