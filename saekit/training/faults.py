"""NaN and Inf: noticed before they reach the weights. The step is left out, by all layers and on all ranks alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saekit.errors import UserError
from saekit.placement import Placement
from saekit.training.state import RunState
from saekit.training.statistics import LayerWindow

FAULTS = ("activations", "loss", "gradient")
"""What can hold NaN or Inf in an optimiser step, causes before effects."""

DIVERGES = "the SAE diverges: try a smaller --lr or more --lr-warmup-steps"
HINTS = {
    "activations": "the language model overflows: try --dtype bfloat16 or float32",
    "loss": DIVERGES,
    "gradient": DIVERGES,
}


def look_for_faults(
    hookpoints: Sequence[str], windows: Mapping[str, LayerWindow], gradients: Mapping[str, Tensor], placement: Placement
) -> Tensor:
    """On how many ranks something is not finite in an optimiser step: int64 `[L, 3]`, as in `FAULTS`. Collective.

    A float64 sum of squares of float32 values is finite if they all are.

    Args:
        hookpoints: Of all L layers.
        windows: Of this rank's layers and of this step alone.
        gradients: The sums that `Placement.collect` returned.
        placement: Where the layers are.
    """
    rows = torch.zeros(len(hookpoints), len(FAULTS), dtype=torch.int64, device=placement.device)
    for name, window in windows.items():
        finite = [window.moments.sum_squares.isfinite(), window.sums.isfinite().all(), gradients[name].isfinite()]
        rows[hookpoints.index(name)] = ~torch.stack(finite)
    return placement.sum(rows)


def name_faults(hookpoints: Sequence[str], counts: Sequence[int]) -> dict[str, str]:
    """What was not finite, by hookpoint, one of `FAULTS` each; `counts` are those of `look_for_faults`, flat."""
    rows = [counts[start : start + len(FAULTS)] for start in range(0, len(counts), len(FAULTS))]
    return {
        name: next(fault for fault, count in zip(FAULTS, row, strict=True) if count)
        for name, row in zip(hookpoints, rows, strict=True)
        if any(row)
    }


def leave_out_step(run: RunState, bad: Mapping[str, str], max_bad_steps: int) -> str:
    """Let a run's counters forget a step; returns a warning that says so.

    Raises:
        UserError: If too many in a row were bad.
    """
    run.skipped += 1
    run.bad_in_row += 1
    for counters in run.counters.values():
        counters.forget()
    layer, fault = next(iter(bad.items()))
    if run.bad_in_row >= max_bad_steps:
        when = f"at step {run.step}"
        if max_bad_steps > 1:
            when = f"in each of the {run.bad_in_row} steps up to {run.step}"
        raise UserError(f"{layer}: NaN or Inf in the {fault} {when} (--max-bad-steps {max_bad_steps}); {HINTS[fault]}")
    others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"Warning: step {run.step} was skipped: NaN or Inf in the {fault} of {layer}{others}"
