"""Reports of the steps since the last report, and the warning about SAEs that diverge."""

from __future__ import annotations

import math
from collections.abc import Mapping

from saekit.machine import peak_memory_bytes
from saekit.placement import Placement
from saekit.report import LayerStats, Lowest, StepStats
from saekit.training.bad_steps import DIVERGES
from saekit.training.plan import RunPlan
from saekit.training.state import RunState
from saekit.units import decimal, plural

NAMED = 8
"""The number of SAEs that a warning names; it counts the others."""


def step_stats(
    run: RunState, plan: RunPlan, placement: Placement, layers: dict[str, LayerStats], tokens_per_second: float
) -> StepStats:
    """Assemble a report and update `run.lowest` with its FVUs. Collective."""
    diverged = _diverged(run, layers, last=run.step == plan.total_steps)
    for name, layer in layers.items():
        if math.isfinite(layer.fvu) and (name not in run.lowest or layer.fvu < run.lowest[name].fvu):
            run.lowest[name] = Lowest(layer.fvu, run.step)
    return StepStats(
        step=run.step,
        tokens=run.tokens,
        tokens_per_second=tokens_per_second,
        learning_rate=plan.units[0].lr * plan.lr_scale(run.step - 1),
        skipped_steps=run.skipped,
        bad_in_row=run.bad_in_row,
        memory_bytes=max(placement.gather(peak_memory_bytes(placement.device))),
        layers=layers,
        diverged=diverged,
    )


def _diverged(run: RunState, layers: Mapping[str, LayerStats], *, last: bool) -> dict[str, Lowest | None]:
    """Return the layers whose SAE has an FVU above 1 and above its lowest so far, with that lowest FVU.

    The last report also includes layers without an earlier report, since a run can end before its second report. If
    every step since the last report was skipped, there is nothing to compare.
    """
    found: dict[str, Lowest | None] = {}
    for name, layer in layers.items():
        before = run.lowest.get(name)
        all_skipped = math.isnan(layer.loss)
        limit = 1.0 if before is None else max(1.0, before.fvu)
        if not all_skipped and not layer.fvu <= limit and (before is not None or last):  # NaN has diverged, too
            found[name] = before
    return found


def warn_of_divergence(stats: StepStats) -> str:
    """Return the warning at the end of a run: which SAEs diverged, their lowest and last FVU, and what to try."""
    told = []
    for name, before in stats.diverged.items():
        now = f"{decimal(stats.layers[name].fvu)} at the end"
        told.append(f"{name} {now}" if before is None else f"{name} {before}, {now}")
    verb = "has" if len(told) == 1 else "have"
    unknown = any(math.isnan(stats.layers[name].fvu) for name in stats.diverged)
    what = "above 1 (worse than predicting the mean of the activations)" + (" or not a number" if unknown else "")
    others = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
    return (
        f"Warning: {len(told)} of {plural(len(stats.layers), 'SAE')} {verb} an FVU {what}: "
        f"{'; '.join(told[:NAMED])}{others}. {DIVERGES[0].upper()}{DIVERGES[1:]}"
    )
