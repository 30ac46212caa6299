"""A run's folder on all ranks: its lock, and the checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from saekit.config import TrainConfig
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.runs.folder import goes_on, put_back
from saekit.runs.lease import EXPIRES
from saekit.runs.lock import RunLock, hold
from saekit.runs.recovery import Found, find_checkpoint
from saekit.training.early import check_writable
from saekit.training.plan import RunPlan
from saekit.training.saving import refuse_other_run


@contextmanager
def one_writer(
    cfg: TrainConfig, run_dir: Path, placement: Placement, say: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Hold the lock of a run's folder for all ranks; rank 0 takes it. Collective on entry.

    `--resume auto` waits up to `--grace` seconds for another process to release it, because the previous job may still
    be saving.

    Args:
        cfg: The training's configuration.
        run_dir: The run's folder.
        placement: The ranks.
        say: Receives messages about the wait.

    Yields:
        A function to call before each save, on all ranks. It raises a `UserError` if another process has taken over
        the folder.

    Raises:
        UserError: On all ranks, if another process trains in the folder, or if it cannot be made.
    """
    with ExitStack() as held:
        lock: RunLock | None = None
        problem: str | None = None
        if placement.rank == 0:
            try:
                check_writable(run_dir)
                lock = held.enter_context(hold(run_dir, cfg.grace if cfg.resume == "auto" else 0.0, say))
                put_back(run_dir.resolve())
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"the run folder {run_dir} cannot be used ({error.strerror}): see --save-dir"
        problem = placement.gather(problem)[0]
        if problem is not None:
            raise UserError(problem)

        def check() -> None:
            if not placement.gather(lock is None or lock.renew())[0]:
                raise UserError(
                    f"another process has taken over the run folder {run_dir}, because this process has not renewed "
                    f"its lock for {EXPIRES:g} seconds (was it suspended?): this process stops and saves nothing more"
                )

        yield check


def checkpoint_to_go_on_from(plan: RunPlan, placement: Placement, say: Callable[[str], None]) -> Found | None:
    """Return the checkpoint to resume from; None for a new run. Rank 0 looks, so all take the same. Collective.

    Raises:
        UserError: On rank 0, if there is no whole checkpoint, or if the run would continue another training.
    """
    found, resume = None, plan.cfg.resume
    if placement.rank == 0 and goes_on(plan.cfg, plan.run_dir):
        say("Looking for a checkpoint to resume from")
        found = find_checkpoint(resume if isinstance(resume, Path) else plan.run_dir)
        refuse_other_run(found.index, plan)
        for damage in found.passed_over:
            say(f"Warning: {damage}")
        say(f"Resuming from {found.folder}")
    return placement.gather(found)[0]
