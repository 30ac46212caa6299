"""Errors that can end a run and are not bugs in saekit."""

from __future__ import annotations

from pathlib import Path

SILENCE = 3.0
"""Seconds that a rank waits before it ends because another one failed. The launcher then shows that rank's error."""


class UserError(ValueError):
    """Raised if an option, path, file, model or data set that the user gave cannot be used.

    The message names the option or path, its value, and what to do. The command line prints the message without a
    traceback and exits with code 2. Python code can catch it as a `ValueError`.
    """


class SaveError(UserError):
    """Raised if a checkpoint cannot be written. Earlier checkpoints are unchanged.

    Args:
        message: See `UserError`.
        lasting: Whether saving would fail again, whatever the state of the disk.
    """

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class Interrupted(KeyboardInterrupt):
    """Raised after a run was stopped at the end of an optimizer step and its checkpoint was written.

    Args:
        step: Number of optimizer steps done.
        run_dir: The run's folder.
        by_user: Whether Ctrl-C stopped it, and not a scheduler's SIGTERM or SIGUSR1.
    """

    def __init__(self, step: int, run_dir: Path, *, by_user: bool) -> None:
        super().__init__(f"stopped after step {step}; `resume` continues from {run_dir}")
        self.step = step
        self.run_dir = run_dir
        self.by_user = by_user


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
