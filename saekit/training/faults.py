"""NaN and Inf are noticed before they reach the weights: all units on all ranks skip the step."""

from __future__ import annotations

from collections.abc import Mapping

from saekit.errors import UserError
from saekit.training.state import RunState

DIVERGES = "the SAE diverges: try a smaller --lr or more --lr-warmup-steps"
HINTS = {
    "activations": "the language model overflows: try --dtype bfloat16 or float32",
    "loss": DIVERGES,
    "gradient": DIVERGES,
}


def skip_step(run: RunState, faults: Mapping[str, str], max_bad_steps: int) -> str:
    """Count a step that was skipped; returns a warning that says so.

    Args:
        run: Where the run stands.
        faults: By hookpoint, see `StepMessage.faults`.
        max_bad_steps: How many in a row end the run.

    Raises:
        UserError: If too many in a row were bad.
    """
    run.skipped += 1
    run.bad_in_row += 1
    name, fault = next(iter(faults.items()))
    if run.bad_in_row >= max_bad_steps:
        when = f"at step {run.step}"
        if max_bad_steps > 1:
            when = f"in each of the {run.bad_in_row} steps up to {run.step}"
        raise UserError(f"{name}: NaN or Inf in the {fault} {when} (--max-bad-steps {max_bad_steps}); {HINTS[fault]}")
    others = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"Warning: step {run.step} was skipped: NaN or Inf in the {fault} of {name}{others}"
