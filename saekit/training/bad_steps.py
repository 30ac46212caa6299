"""Steps with NaN or Inf: each is skipped. Too many in a row, or a bad last step, fail the run."""

from __future__ import annotations

from collections.abc import Mapping

from saekit.errors import UserError
from saekit.training.state import Fault, RunState

DIVERGES = "the SAE diverges; try a smaller --lr or more --lr-warmup-steps"
HINTS = {
    "activations": "the language model overflows; try --dtype bfloat16 or float32",
    "loss": DIVERGES,
    "gradient": DIVERGES,
}


def skip_step(run: RunState, faults: Mapping[str, str], max_bad_steps: int) -> str:
    """Count a skipped step and return the warning about it.

    Args:
        run: The state of the run; its counters of skipped steps are updated.
        faults: By hookpoint, see `StepMessage.faults`.
        max_bad_steps: The number of skipped steps in a row that ends the run.

    Raises:
        UserError: If this step was the last of `max_bad_steps` skipped steps in a row.
    """
    run.skipped += 1
    run.bad_in_row += 1
    run.last_fault = fault = Fault(*next(iter(faults.items())))
    if run.bad_in_row >= max_bad_steps:
        when = f"at step {run.step}"
        if max_bad_steps > 1:
            when = f"in each of the {run.bad_in_row} steps up to {run.step}"
        raise UserError(f"{_named(fault)} {when} (--max-bad-steps {max_bad_steps}): {HINTS[fault.part]}")
    others = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"Warning: step {run.step} was skipped: NaN or Inf in the {fault.part} of {fault.hookpoint}{others}"


def check_last_step(run: RunState) -> None:
    """Raise an error if the last step of a run was skipped. All ranks have the same state and decide the same.

    The checkpoint of that step exists and holds the weights after the last good step, so a run whose last batch is bad
    loses nothing. `Saver` keeps the older checkpoints in this case.

    Raises:
        UserError: If the last step was skipped. Resuming such a run raises it again.
    """
    if not run.bad_in_row or run.last_fault is None:
        return
    name, part = run.last_fault
    when = f"in each of the last {run.bad_in_row} steps" if run.bad_in_row > 1 else "in the last step"
    lowest = f" (lowest FVU: {run.lowest[name]})" if name in run.lowest else ""
    good = run.step - run.bad_in_row
    raise UserError(
        f"{_named(run.last_fault)} {when}{lowest}: {HINTS[part]}. {run.checkpoint} holds the SAEs as they were "
        f"{f'after step {good:,}' if good else 'at the beginning'}, and older checkpoints are kept"
    )


def _named(fault: Fault) -> str:
    return f"{fault.hookpoint}: NaN or Inf in the {fault.part}"
