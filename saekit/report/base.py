"""The reporter interface. A reporter only watches: it gets frozen numbers and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from saekit.report.stats import EvalStats, RunInfo, StepStats


class Reporter(Protocol):
    """Told of a run's events: `status`*, `start`, (`step` | `evaluated` | `saved` | `status`)*, `finish`.

    `finish` is called exactly once, also when the run ends by an exception or Ctrl-C, and must leave the terminal
    as it was.
    """

    def status(self, message: str) -> None:
        """Say one line about long set-up work, or a warning while the run goes on."""

    def start(self, info: RunInfo) -> None:
        """Training is about to begin."""

    def step(self, stats: StepStats) -> None:
        """A reporting interval has ended."""

    def evaluated(self, stats: EvalStats) -> None:
        """The SAEs were evaluated on data that trains nothing."""

    def saved(self, path: Path, step: int) -> None:
        """A checkpoint is in place."""

    def finish(self) -> None:
        """Training has ended, one way or the other."""


class TerminalReporter(Reporter, Protocol):
    """A reporter for people, which can also show a run that another process trains (`saekit watch`)."""

    def note(self, text: str) -> None:
        """Show a line about the run, in place of the one before; none if it is empty."""

    def leave(self) -> None:
        """Stop showing a run that goes on. Takes the place of `finish`."""


class Reporters:
    """Hands every event on to each of several reporters; with none it is the null object.

    As a context manager it sees to it that `finish` is called, whatever happens.
    """

    def __init__(self, reporters: Sequence[Reporter] = ()) -> None:
        self.reporters = tuple(reporters)

    def __enter__(self) -> Reporters:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    def status(self, message: str) -> None:
        """Pass a line on."""
        for reporter in self.reporters:
            reporter.status(message)

    def start(self, info: RunInfo) -> None:
        """Tell all that training is about to begin."""
        for reporter in self.reporters:
            reporter.start(info)

    def step(self, stats: StepStats) -> None:
        """Pass a report on."""
        for reporter in self.reporters:
            reporter.step(stats)

    def evaluated(self, stats: EvalStats) -> None:
        """Pass an evaluation on."""
        for reporter in self.reporters:
            reporter.evaluated(stats)

    def saved(self, path: Path, step: int) -> None:
        """Tell all that a checkpoint is in place."""
        for reporter in self.reporters:
            reporter.saved(path, step)

    def finish(self) -> None:
        """Tell all that training has ended."""
        for reporter in self.reporters:
            reporter.finish()
