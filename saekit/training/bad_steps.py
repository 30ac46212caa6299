"""Steps with NaN or Inf: each is skipped; too many in a row, or one at the end, are a failure of the run."""

from __future__ import annotations

from collections.abc import Mapping

from saekit.errors import UserError
from saekit.training.state import Fault, RunState

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
    run.last_fault = fault = Fault(*next(iter(faults.items())))
    if run.bad_in_row >= max_bad_steps:
        when = f"at step {run.step}"
        if max_bad_steps > 1:
            when = f"in each of the {run.bad_in_row} steps up to {run.step}"
        raise UserError(f"{_named(fault)} {when} (--max-bad-steps {max_bad_steps}); {HINTS[fault.part]}")
    others = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"Warning: step {run.step} was skipped: NaN or Inf in the {fault.part} of {fault.hookpoint}{others}"


def check_last_step(run: RunState) -> None:
    """Refuse to call a run done whose last step was skipped. All ranks know the same and decide the same.

    The checkpoint of that step is there, since its weights are those of the last good step: of a run that met one bad
    batch at its end nothing is lost. `Saver` deletes no older one for it.

    Raises:
        UserError: If the last step was skipped, also where a finished run of that kind is resumed.
    """
    if not run.bad_in_row or run.last_fault is None:
        return
    name, part = run.last_fault
    when = f"in each of the last {run.bad_in_row} steps" if run.bad_in_row > 1 else "in the last step"
    lowest = f", its lowest FVU was {run.lowest[name]}" if name in run.lowest else ""
    good = run.step - run.bad_in_row
    raise UserError(
        f"{_named(run.last_fault)} {when}{lowest}; {run.checkpoint} holds the SAEs as they were "
        f"{f'after step {good:,}' if good else 'at the beginning'}, and older checkpoints are kept; {HINTS[part]}"
    )


def _named(fault: Fault) -> str:
    return f"{fault.hookpoint}: NaN or Inf in the {fault.part}"
