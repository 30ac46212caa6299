"""Errors that can end a run, other than faults of saekit."""

from __future__ import annotations

from pathlib import Path

SILENCE = 3.0
"""Seconds that a rank waits before it follows one that had an error, so that the launcher lets that one speak."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the option or path, the value it had, and what to do. The command line
    prints it without a traceback and exits with code 2; a Python caller catches it as a `ValueError`.
    """


class SaveError(UserError):
    """A checkpoint could not be written; those there were are as they were.

    Args:
        message: See `UserError`.
        lasting: Whether it would fail again, whatever becomes of the disk.
    """

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class Interrupted(KeyboardInterrupt):
    """A run was stopped after a whole optimizer step, and its checkpoint is in place.

    Args:
        step: Optimizer steps done.
        run_dir: The run's folder.
        by_user: By Ctrl-C, and not by a scheduler's SIGTERM or SIGUSR1.
    """

    def __init__(self, step: int, run_dir: Path, *, by_user: bool) -> None:
        super().__init__(f"stopped after step {step}; `resume` goes on from {run_dir}")
        self.step = step
        self.run_dir = run_dir
        self.by_user = by_user


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, for a message of one line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
