"""The state of a run between two optimiser steps, besides the parameters: calibration, counters, step and tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.errors import UserError
from saekit.placement import Placement
from saekit.runs.checkpoint import LayerRecord
from saekit.runs.recovery import read_state
from saekit.sae import Sae
from saekit.sae.decoder import give_encoder_the_norms_
from saekit.sae.storage import WEIGHTS_FILE, find_sae_folders, load_from_disk
from saekit.training.counters import LayerCounters
from saekit.training.plan import RunPlan
from saekit.training.statistics import Moments


@dataclass(frozen=True)
class Calibration:
    """What the first global batch said about a layer; fixed for the run."""

    mean_D: Tensor
    """`[D]`, float32: the initial `b_dec`."""
    variance: float
    """σ², the total variance (trace of the covariance), by which the loss is divided."""
    max_norm: float | None = None
    """How long activations are at most that train the layer; None for any. Mean and variance are of such ones."""

    @property
    def rms(self) -> float:
        """Root mean square of the centred activations, `σ / √D`: the unit of the biases."""
        return float((self.variance / len(self.mean_D)) ** 0.5)


@dataclass
class RunState:
    """Where a run stands."""

    step: int = 0
    """Optimiser steps done."""
    tokens: int = 0
    """Tokens that trained the SAEs, over all ranks."""
    skipped: int = 0
    """Optimiser steps left out because of NaN or Inf."""
    bad_in_row: int = 0
    """How many of them were the last ones."""
    calibration: dict[str, Calibration] = field(default_factory=dict)
    counters: dict[str, LayerCounters] = field(default_factory=dict)
    error: dict[str, Tensor] = field(default_factory=dict)
    """Mean squared error per token in the last step that counted, over all ranks: float64 scalars on the device. The
    variance before the first one."""
    evaluated: int = 0
    """The step after which the SAEs were evaluated last; 0 before the first time."""
    best_fvu: float = float("inf")
    """The lowest mean FVU between two checkpoints so far."""
    checkpoint: Path | None = None
    """The one that was written last, or gone on from."""


def new_sae(plan: RunPlan, hookpoint: str) -> Sae:
    """A fresh SAE on the CPU. Its weights depend on the seed and the layer's number only, not on the other layers."""
    layer = plan.layers[plan.hookpoints.index(hookpoint)]
    generator = torch.Generator().manual_seed(plan.cfg.init_seed * 100_003 + layer)
    fresh = Sae(**plan.cfg.sae.sizes(plan.d_in, plan.num_latents), generator=generator)
    fresh.chosen_kernels = plan.kernels
    fresh.prefixes = plan.cfg.sae.resolve_prefixes(plan.num_latents)
    return fresh


def load_finetune(path: Path, hookpoint: str, sae: Sae, *, alone: bool) -> Sae:
    """Replace the weights of a fresh SAE by those of an earlier one, in place.

    Where decoder rows are kept at norm 1 and the earlier one's are not, the encoder takes their lengths: what a chosen
    latent adds to the reconstruction stays, and the first optimiser step does not change it at one blow.

    Args:
        path: A run or a checkpoint with the same hookpoints, or, for a bank of one layer, one SAE's folder.
        hookpoint: Whose SAE it is.
        sae: The fresh one.
        alone: Whether the bank has this layer only.

    Returns:
        The earlier one, as it is in its file.

    Raises:
        UserError: If the SAE is missing there, is damaged or has another size.
    """
    try:
        single = (path / WEIGHTS_FILE).is_file() and alone
        folders = {hookpoint: path} if single else find_sae_folders(path)
        if hookpoint not in folders:
            raise ValueError(f"it has no SAE for {hookpoint}, only for {', '.join(folders)}")
        source = load_from_disk(folders[hookpoint])
        if (source.num_latents, source.d_in) != (sae.num_latents, sae.d_in):
            raise ValueError(
                f"its SAE for {hookpoint} has {source.num_latents} latents for width {source.d_in}, "
                f"this run {sae.num_latents} for width {sae.d_in}"
            )
        sae.load_state_dict(source.state_dict())
        if sae.normalize_decoder:
            give_encoder_the_norms_(sae)
        return source
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--finetune {path}: {error}") from error


def calibration(name: str, moments: Moments, max_norm: float | None = None) -> Calibration:
    """Mean and variance of one layer from the sums over the first global batch's activations up to `max_norm`.

    Raises:
        UserError: If the activations hold NaN or Inf, or do not vary.
    """
    if not bool(torch.isfinite(moments.sum_squares)):
        raise UserError(
            f"{name}: NaN or Inf in the activations of the first batch: the language model overflows; "
            "try --dtype bfloat16 or float32"
        )
    variance = float(moments.total_variance())
    # Rounding leaves a little of a variance that is zero.
    if not variance > 1e-12 * float(moments.sum_squares / moments.count):
        raise UserError(f"{name}: its activations on the first batch do not vary, so there is nothing to learn")
    return Calibration(moments.mean_D().float(), variance, max_norm)


def check_weights(name: str, weights: dict[str, Tensor], step: int) -> None:
    """Stop rather than save what nobody can go on from."""
    for tensor in weights.values():
        if not bool(torch.isfinite(tensor.sum())):  # a sum needs no memory, unlike isfinite of each element
            raise UserError(
                f"{name}: NaN or Inf in the SAE's weights at step {step}, which is not saved; try a smaller --lr"
            )


def records(
    state: RunState, placement: Placement, about: dict[str, Any], fvu: dict[str, float]
) -> Iterator[tuple[str, LayerRecord]]:
    """What a checkpoint keeps of each layer that this rank leads, made one layer at a time. Collective."""
    for name, weights, optimizer_state in placement.each_whole():
        check_weights(name, weights, state.step)
        calibration, limit = state.calibration[name], state.calibration[name].max_norm
        tensors = {
            **state.counters[name].state(),
            "mean": calibration.mean_D,
            "error": state.error[name],
            "variance": torch.tensor(calibration.variance, dtype=torch.float64),
            **({} if limit is None else {"max_norm": torch.tensor(limit, dtype=torch.float64)}),
            **{f"optim.{key}": value for key, value in optimizer_state.items()},
        }
        layer_about = {"hookpoint": name, "step": state.step, "tokens": state.tokens, **about, "fvu": fvu.get(name)}
        yield name, LayerRecord(placement.sae(name), weights, tensors, layer_about)


def read_calibration(checkpoint: Path, hookpoints: Iterable[str]) -> dict[str, Calibration]:
    """What a checkpoint knows of the first global batch, on the CPU.

    Raises:
        UserError: If a file is missing or damaged.
    """
    found = {}
    for name in hookpoints:
        tensors = read_state(checkpoint / name, ("mean", "variance"), ("max_norm",))
        max_norm = float(tensors["max_norm"]) if "max_norm" in tensors else None
        found[name] = Calibration(tensors["mean"].clone(), float(tensors["variance"]), max_norm)
    return found


def restore(checkpoint: Path, index: dict[str, Any], state: RunState, placement: Placement) -> None:
    """Put a run back to where a checkpoint left it; `index` is what `read_index` said of it, its calibration is read.

    Raises:
        UserError: If a file is missing or damaged.
    """
    state.checkpoint = checkpoint
    state.step, state.tokens = index["step"], index["tokens"]
    state.skipped, state.bad_in_row = index["skipped_steps"], index["bad_steps_in_row"]
    state.evaluated = index["evaluated_step"]
    state.best_fvu = float("inf") if index["best_fvu"] is None else index["best_fvu"]
    for name in placement.layers():
        tensors = read_state(checkpoint / name)
        known = state.calibration[name]
        state.calibration[name] = replace(known, mean_D=known.mean_D.to(placement.device))
        state.counters[name].load_state(tensors)
        state.error[name].copy_(tensors["error"])
        optimizer = {key.removeprefix("optim."): value for key, value in tensors.items() if key.startswith("optim.")}
        saved = load_from_disk(checkpoint / name)
        placement.load(name, saved.state_dict(), optimizer)
        placement.sae(name).threshold = saved.threshold
