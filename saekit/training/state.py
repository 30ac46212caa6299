"""The state of a run between two optimizer steps, how its SAEs begin, and what a checkpoint keeps of each unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit.errors import UserError
from saekit.report import Lowest
from saekit.runs.checkpoint import LayerRecord
from saekit.runs.opening import open_sae
from saekit.runs.recovery import read_state
from saekit.sae import Sae
from saekit.sae.decoder import give_encoder_the_norms_
from saekit.sae.model import without_memory
from saekit.sae.selection.base import make_selection
from saekit.sae.storage import WEIGHTS_FILE, find_sae_folders, folder_name
from saekit.training.bank import Bank
from saekit.training.plan import RunPlan
from saekit.training.statistics import Moments
from saekit.training.unit import Calibration


class Fault(NamedTuple):
    """Where NaN or Inf was first seen in a step."""

    hookpoint: str
    part: str
    """One of `saekit.training.message.FAULTS`."""


@dataclass
class RunState:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens that trained the SAEs, over all ranks."""
    skipped: int = 0
    """Optimizer steps skipped because of NaN or Inf."""
    bad_in_row: int = 0
    """The number of skipped steps in a row, up to now."""
    last_fault: Fault | None = None
    """Of the step that was skipped last."""
    lowest: dict[str, Lowest] = field(default_factory=dict)
    """By hookpoint, the lowest FVU that a report had so far."""
    calibration: dict[str, Calibration] = field(default_factory=dict)
    evaluated: int = 0
    """The step after which the SAEs were evaluated last; 0 before the first time."""
    best_fvu: float = float("inf")
    """The lowest mean FVU between two checkpoints so far."""
    checkpoint: Path | None = None
    """The checkpoint that was written last, or that the run continued from."""


def new_sae(plan: RunPlan, name: str, *, blank: bool = False) -> Sae:
    """Make a fresh SAE on the CPU. Its weights depend on the seed and the hookpoint only, not on the other units.

    Args:
        plan: The run.
        name: The hookpoint.
        blank: Leave the weights open instead of drawing them.
    """
    unit = plan.unit(name)
    sizes = plan.cfg.sae.sizes(unit.hookpoint.width, unit.num_latents)
    if blank:
        selection = make_selection(sizes["selection"], sizes["k"], sizes["num_latents"])  # on the CPU, not on meta
        fresh = without_memory(**{**sizes, "selection": selection}).to_empty(device="cpu")
    else:
        fresh = Sae(**sizes, generator=torch.Generator().manual_seed(unit.hookpoint.seed(plan.cfg.init_seed)))
    fresh.chosen_kernels = plan.kernels
    fresh.prefixes = plan.cfg.sae.resolve_prefixes(unit.num_latents)
    return fresh


def load_finetune(path: Path, hookpoint: str, sae: Sae, *, only_unit: bool) -> Sae:
    """Replace the weights of a fresh SAE by those of an earlier one, in place.

    Where decoder rows are kept at norm 1 and the earlier one's are not, the encoder takes their lengths: what a chosen
    latent adds to the reconstruction then stays the same until the first optimizer step.

    Args:
        path: A run or a checkpoint with the same hookpoints, or, for a bank of one layer, one SAE's folder.
        hookpoint: Whose SAE it is.
        sae: The fresh one.
        only_unit: Whether the bank has no other unit.

    Returns:
        The earlier one, as it is in its file.

    Raises:
        UserError: If the SAE is missing there, is damaged or has another size.
    """
    try:
        single = (path / WEIGHTS_FILE).is_file() and only_unit
        folders = {hookpoint: path} if single else find_sae_folders(path)
        if hookpoint not in folders:
            raise ValueError(f"it has no SAE for {hookpoint}, only for {', '.join(folders)}")
        source = open_sae(folders[hookpoint], otherwise="")
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
    """Compute a hookpoint's mean and variance from sums over the first global batch's counted activations.

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


def are_finite(weights: dict[str, Tensor]) -> bool:
    """Tell whether weights are without NaN and Inf."""
    # A sum needs no memory, unlike isfinite of each element.
    return all(bool(torch.isfinite(tensor.sum())) for tensor in weights.values())


def records(
    run: RunState, bank: Bank, plan: RunPlan, about: dict[str, Any], fvu: dict[str, float]
) -> Iterator[tuple[str, LayerRecord]]:
    """Make a checkpoint's content of each unit that this rank leads, one unit at a time. Collective.

    Raises:
        UserError: At the end, if weights have NaN or Inf, which no run could continue from.
    """
    placement = bank.placement
    broken: list[str] = []
    for name, weights, optimizer_state in placement.each_whole():
        if broken or not are_finite(weights):
            broken.append(name)  # other ranks still need this one's part of the units that they write
            continue
        known = run.calibration[name]
        limit = known.max_norm
        tensors = {
            **bank.state_of(name),
            "mean": known.mean_D,
            "variance": torch.tensor(known.variance, dtype=torch.float64),
            **({} if limit is None else {"max_norm": torch.tensor(limit, dtype=torch.float64)}),
            **{f"optim.{key}": value for key, value in optimizer_state.items()},
        }
        unit_about = {
            "hookpoint": name,
            "step": run.step,
            "tokens": run.tokens,
            **about,
            "dead_feature_threshold": plan.unit(name).dead_threshold,
            "fvu": fvu.get(name),
        }
        yield name, LayerRecord(placement.sae(name), weights, tensors, unit_about)
        del weights, optimizer_state, tensors  # before the next unit is made
    if broken:
        raise UserError(
            f"{broken[0]}: NaN or Inf in the SAE's weights at step {run.step}, which is not saved; try a smaller --lr"
        )


def read_calibration(checkpoint: Path, hookpoints: Iterable[str]) -> dict[str, Calibration]:
    """Read the calibration from a checkpoint, on the CPU.

    Raises:
        UserError: If a file is missing or damaged.
    """
    found = {}
    for name in hookpoints:
        tensors = read_state(checkpoint / folder_name(name), ("mean", "variance"), ("max_norm",))
        max_norm = float(tensors["max_norm"]) if "max_norm" in tensors else None
        found[name] = Calibration(tensors["mean"].clone(), float(tensors["variance"]), max_norm)
    return found


def restore(checkpoint: Path, index: dict[str, Any], run: RunState, bank: Bank) -> None:
    """Restore a run from a checkpoint; `index` is what `read_index` returned, and its calibration is read already.

    Raises:
        UserError: If a file is missing or damaged.
    """
    run.checkpoint = checkpoint
    run.step, run.tokens = index["step"], index["tokens"]
    run.skipped, run.bad_in_row = index["skipped_steps"], index["bad_steps_in_row"]
    run.last_fault = Fault(*index["last_fault"]) if index.get("last_fault") else None  # an older index has none
    run.lowest = {name: Lowest(*each) for name, each in index.get("lowest_fvu", {}).items()}
    run.evaluated = index["evaluated_step"]
    run.best_fvu = float("inf") if index["best_fvu"] is None else index["best_fvu"]
    for name in bank.names:
        folder = checkpoint / folder_name(name)
        tensors = read_state(folder)
        bank.load_state(name, tensors)
        optimizer = {key.removeprefix("optim."): value for key, value in tensors.items() if key.startswith("optim.")}
        saved = Sae.load_from_disk(folder)
        bank.placement.load(name, saved.state_dict(), optimizer)
        bank.placement.sae(name).selection.load_(saved.selection)
    bank.count_dead()
