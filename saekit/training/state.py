"""The state of a run between two optimizer steps, fresh SAEs, and what a checkpoint keeps of each unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit.activations.sites import Site
from saekit.errors import UserError
from saekit.report import Lowest
from saekit.runs.checkpoint import LayerRecord
from saekit.runs.recovery import read_state
from saekit.sae import Sae
from saekit.sae.model import without_memory
from saekit.sae.selection.base import make_selection
from saekit.sae.storage import folder_name
from saekit.training.bank import Bank
from saekit.training.frame import crosscoder_frame, frame_of, needs_frame, transcoder_frame
from saekit.training.plan import RunPlan
from saekit.training.statistics import Moments
from saekit.training.unit import Calibration

FRAME = "frame."
"""Prefix in a checkpoint for a unit's frame and for its weights in that frame."""


class Fault(NamedTuple):
    """Where NaN or Inf was first seen in a step."""

    hookpoint: str
    part: str
    """One of `saekit.training.message.FAULTS`."""


@dataclass
class RunState:
    """The state of a run."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens that trained the SAEs, over all ranks."""
    skipped: int = 0
    """Optimizer steps skipped because of NaN or Inf."""
    bad_in_row: int = 0
    """Skipped steps in a row, up to the current step."""
    last_fault: Fault | None = None
    """The fault of the last skipped step."""
    lowest: dict[str, Lowest] = field(default_factory=dict)
    """By hookpoint, the lowest FVU of all reports so far."""
    calibration: dict[str, Calibration] = field(default_factory=dict)
    """By site."""
    evaluated: int = 0
    """The step after which the SAEs were last evaluated; 0 before the first evaluation."""
    best_fvu: float = float("inf")
    """The lowest mean FVU between two checkpoints so far."""
    checkpoint: Path | None = None
    """The last written checkpoint, or the one that the run resumed from."""


def new_sae(plan: RunPlan, name: str, *, blank: bool = False) -> Sae:
    """Make a fresh SAE on the CPU. Its weights depend on the seed and the hookpoint only, not on the other units.

    Args:
        plan: The run.
        name: The hookpoint.
        blank: Leave the weights uninitialized, since the caller fills them.
    """
    unit = plan.unit(name)
    sizes = unit.sizes(plan.cfg)
    if blank:
        selection = make_selection(sizes["selection"], sizes["k"], sizes["num_latents"])  # on the CPU, not on meta
        fresh = without_memory(**{**sizes, "selection": selection}).to_empty(device="cpu")
    else:
        fresh = Sae(**sizes, generator=torch.Generator().manual_seed(unit.site.seed(plan.cfg.init_seed)))
    fresh.chosen_kernels = plan.kernels
    fresh.prefixes = plan.cfg.sae.resolve_prefixes(unit.num_latents)
    return fresh


def calibration(site: Site, moments: Sequence[Moments], limits: Sequence[float] = ()) -> Calibration:
    """Compute a site's calibration from sums over the first global batch's counted activations.

    Args:
        site: The site.
        moments: The moments of each of its parts.
        limits: The norm limits of the input and of a transcoder's target; empty for none.

    Raises:
        UserError: If the activations hold NaN or Inf, or do not vary.
    """
    variances = [_variance(part.name, each) for part, each in zip(site.parts, moments, strict=True)]
    means = [each.mean_D().float() for each in moments]
    limit, limit_out = (*limits, None, None)[:2]
    if site.transcodes:
        read = len(site.reads)
        mean_D, variance = torch.cat(means[read:]), sum(variances[read:])
        frame = transcoder_frame(
            site.d_in, torch.cat(means[:read]).cpu(), sum(variances[:read]), (variance / site.d_out) ** 0.5
        )
        return Calibration(mean_D, variance, limit, limit_out, frame)
    if not needs_frame(site):
        return Calibration(means[0], variances[0], limit)
    frame = crosscoder_frame([each.width for each in site.parts], variances)
    return Calibration(torch.cat(means) * frame.scale_D.to(means[0].device), float(site.d_in), limit, None, frame)


def _variance(name: str, moments: Moments) -> float:
    if not bool(torch.isfinite(moments.sum_squares)):
        raise UserError(
            f"{name}: NaN or Inf in the activations of the first batch: the language model overflows; "
            "try --dtype bfloat16 or float32"
        )
    variance = float(moments.total_variance())
    # Because of rounding, a variance of zero may come out as slightly more.
    if not variance > 1e-12 * float(moments.sum_squares / moments.count):
        raise UserError(
            f"{name}: the activations of the first batch do not vary, so there is nothing to learn: "
            "leave out this hookpoint, or check the data"
        )
    return variance


def are_finite(weights: dict[str, Tensor]) -> bool:
    """Tell whether weights are free of NaN and Inf."""
    # A sum needs no memory; isfinite of each element would.
    return all(bool(torch.isfinite(tensor.sum())) for tensor in weights.values())


def records(
    run: RunState, bank: Bank, plan: RunPlan, about: dict[str, Any], fvu: dict[str, float]
) -> Iterator[tuple[str, LayerRecord]]:
    """Yield a checkpoint's content for each unit that this rank leads, one unit at a time. Collective.

    Args:
        run: The state of the run.
        bank: The units.
        plan: The run.
        about: Entries about the run for each unit's `cfg.json`.
        fvu: The units' FVUs in the last report, by hookpoint.

    Raises:
        UserError: After the last unit, if weights have NaN or Inf: no run could resume from them.
    """
    placement = bank.placement
    broken: list[str] = []
    for name, weights, optimizer_state in placement.each_whole():
        if broken or not are_finite(weights):
            broken.append(name)  # go on: other ranks need this rank's parts of their units
            continue
        known = run.calibration[name]
        tensors = {
            **bank.state_of(name),
            **calibration_tensors(known),
            **{f"{FRAME}{key}": value for key, value in (known.frame.inexact(weights) if known.frame else {}).items()},
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
        delivered = weights if known.frame is None else known.frame.fold(weights)
        yield name, LayerRecord(placement.sae(name), delivered, tensors, unit_about)
        del delivered, weights, optimizer_state, tensors  # free them before the next unit is assembled
    if broken:
        raise UserError(
            f"{broken[0]}: NaN or Inf in the {plan.coder}'s weights at step {run.step}, so this step is not saved: "
            "try a smaller --lr"
        )


def calibration_tensors(known: Calibration) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint keeps of a calibration."""
    numbers = {"variance": known.variance, "max_norm": known.max_norm, "max_norm_out": known.max_norm_out}
    kept = {name: torch.tensor(each, dtype=torch.float64) for name, each in numbers.items() if each is not None}
    frame = {} if known.frame is None else known.frame.tensors()
    return {"mean": known.mean_D, **kept, **{f"{FRAME}{name}": each for name, each in frame.items()}}


def read_calibration(checkpoint: Path, sites: Iterable[Site]) -> dict[str, Calibration]:
    """Read the calibration of each site from a checkpoint, on the CPU.

    Raises:
        UserError: If a file is missing or damaged.
    """
    found = {}
    for site in sites:
        of_frame = ("scale", "rms", *(("shift",) if site.transcodes else ())) if needs_frame(site) else ()
        needed = ("mean", "variance", *(f"{FRAME}{key}" for key in of_frame))
        tensors = read_state(checkpoint / folder_name(site.name), needed, ("max_norm", "max_norm_out"))
        limit, limit_out = (float(tensors[key]) if key in tensors else None for key in ("max_norm", "max_norm_out"))
        frame = frame_of(site, {key: tensors[f"{FRAME}{key}"].clone() for key in of_frame})
        found[site.name] = Calibration(tensors["mean"].clone(), float(tensors["variance"]), limit, limit_out, frame)
    return found


def restore(checkpoint: Path, index: dict[str, Any], run: RunState, bank: Bank) -> None:
    """Restore a run from a checkpoint.

    Args:
        checkpoint: Its folder.
        index: What `read_index` returned.
        run: The state to fill in. Its calibration must be read already.
        bank: The units to load.

    Raises:
        UserError: If a file is missing or damaged.
    """
    run.checkpoint = checkpoint
    run.step, run.tokens = index["step"], index["tokens"]
    run.skipped, run.bad_in_row = index["skipped_steps"], index["bad_steps_in_row"]
    run.last_fault = Fault(*index["last_fault"]) if index.get("last_fault") else None  # older checkpoints have none
    run.lowest = {name: Lowest(*each) for name, each in index.get("lowest_fvu", {}).items()}
    run.evaluated = index["evaluated_step"]
    run.best_fvu = float("inf") if index["best_fvu"] is None else index["best_fvu"]
    for name in bank.names:
        folder = checkpoint / folder_name(name)
        tensors = read_state(folder)
        bank.load_state(name, tensors)
        optimizer = {key.removeprefix("optim."): value for key, value in tensors.items() if key.startswith("optim.")}
        saved = Sae.load_from_disk(folder)
        weights = saved.state_dict()
        if (frame := run.calibration[name].frame) is not None:
            weights = frame.unfold(weights)
            weights |= {key: tensors[f"{FRAME}{key}"] for key in frame.inexact(weights)}
        bank.placement.load(name, weights, optimizer)
        bank.placement.sae(name).selection.load_(saved.selection)
    bank.count_dead()
