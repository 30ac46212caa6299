"""A run's folder as all ranks see it: the right to write in it, and the checkpoint to go on from."""

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
    """Hold the lock of a run's folder for all ranks; rank 0 takes it. Collective, at the beginning.

    `--resume auto` waits for up to `--grace` seconds for another process to give it back: the job that was there before
    may still be saving.

    Yields:
        What to call before each save, on all ranks. It raises a `UserError` if another process has taken the folder
        over meanwhile.

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
                    f"another process has taken the run folder {run_dir} over, because this one has not renewed its "
                    f"lock for {EXPIRES:g} seconds (was it stopped?): nothing more is written here"
                )

        yield check


def checkpoint_to_go_on_from(plan: RunPlan, placement: Placement, say: Callable[[str], None]) -> Found | None:
    """Find the checkpoint to continue from, if the run continues. One rank looks, so that all take the same.

    Raises:
        UserError: On the rank that looks, if there is none, or if the run would be another training.
    """
    found, resume = None, plan.cfg.resume
    if placement.rank == 0 and goes_on(plan.cfg, plan.run_dir):
        say("Looking for a whole checkpoint")
        found = find_checkpoint(resume if isinstance(resume, Path) else plan.run_dir)
        refuse_other_run(found.index, plan)
        for damage in found.passed_over:
            say(f"Warning: {damage}")
        say(f"Going on from {found.folder}")
    return placement.gather(found)[0]
