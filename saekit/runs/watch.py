"""`saekit watch`: a reporter that is fed by a run's files, while another process trains it."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from saekit.errors import UserError
from saekit.report.base import TerminalReporter
from saekit.report.live_table import TREND_REPORTS
from saekit.report.stats import RunInfo
from saekit.report.terminal import terminal_reporter
from saekit.runs.folder import way_on
from saekit.runs.follow import LeaseWatch, MetricsTail, Pulse
from saekit.runs.layout import LATEST, LOCK_FILE, METRICS_FILE, STEP_FOLDER, run_of
from saekit.runs.metrics import END, EVALUATION
from saekit.runs.records import evaluation_of, info_of, info_of_checkpoint, stats_of

QUIET, LONG = 60.0, 5.0
"""Seconds without a report, and their multiple of the longest interval between recent ones, from which it is said."""


class RunTime:
    """A clock that shows the times of a run's records, and between them this machine's: Unix time, in seconds."""

    def __init__(self) -> None:
        self.newest = 0.0
        """Time of the newest record."""
        self.stands = True
        """Whether it shows that: while records are taken in, and when nothing more comes."""

    def __call__(self) -> float:
        """Return the time."""
        return self.newest if self.stands else max(self.newest, time.time())


class Watch:
    """Shows a run as the process that trains it does, from what that writes.

    Args:
        run_dir: The run's folder; it need not be there yet.
        reporter: Makes what shows the run, given the clock by which it does so.
    """

    def __init__(self, run_dir: Path, reporter: Callable[[Callable[[], float]], TerminalReporter]) -> None:
        self.run_dir = run_dir
        self._make = reporter
        self._clock = RunTime()
        self._reporter = reporter(self._clock)
        self._metrics, self._lease = MetricsTail(run_dir / METRICS_FILE), LeaseWatch(run_dir)
        self._info: RunInfo | None = None
        """Of the run that is shown; None before it has begun."""
        self._untold: deque[dict[str, Any]] = deque(maxlen=TREND_REPORTS + 1)
        """Records that were not shown yet, because nothing else is known of the run."""
        self._ended = False
        """Whether the newest record is of an end."""
        self._alone = 0
        """Looks in a row for which no process trained."""
        self._saved: str | None = None
        """The folder of its newest checkpoint."""
        self._said = ""
        """The newest line about a run that has not begun."""
        self._intervals: deque[float] = deque(maxlen=TREND_REPORTS)
        """Seconds between records."""
        self.pulse = Pulse(None, False)
        """As it was found by the last look."""

    def look(self) -> bool:
        """Show what is new, and return whether the run has ended.

        Raises:
            UserError: If a file of the run cannot be read, or an older version has left too little to show.
        """
        self.pulse = self._lease.look()  # before the records: a process gives its lease back after the last one
        self._alone = 0 if self.pulse.writer else self._alone + 1
        news = self._metrics.news()
        self._clock.stands = True
        if news.replaced or news.start is not None:
            self._forget()
        self._untold += news.records
        if self._info is None:
            self._begin(news.start)
        if self._info is not None:
            self._tell()
        self._clock.stands = not self.pulse.alive or self._resuming()
        if self._info is not None and not self.pulse.alive and (self._ended or self._alone > 1):
            self._finish()
            return True
        self._say()
        return False

    def leave(self) -> str:
        """Stop watching, and say how the run is."""
        self._reporter.leave()
        if self.pulse.alive:
            return "The run goes on"
        return f"No process trains in {self.run_dir}" + (f": {way_on(self.run_dir)}" if self._info else "")

    def _finish(self) -> None:
        self._clock.stands = True
        self._reporter.note("")
        self._reporter.finish()

    def _forget(self) -> None:
        """Make room for another run in the same folder, or for the same one, resumed."""
        if self._info is not None:
            self._finish()
            self._reporter = self._make(self._clock)
        self._info, self._ended, self._saved, self._said = None, False, None, ""
        self._untold.clear()
        self._intervals.clear()

    def _begin(self, start: dict[str, Any] | None) -> None:
        if start is not None:
            self._info, self._clock.newest = info_of(start, self.run_dir), start["time"]
        elif self._untold:
            self._info, self._clock.newest = info_of_checkpoint(self.run_dir), self._untold[0]["time"]
            if self._info is None and self._alone > 1:
                raise UserError(
                    f"{self.run_dir}: an older saekit trained this run and saved no checkpoint, so its length is not "
                    "known; train it again to watch it"
                )
        if self._info is not None:
            self._reporter.start(self._info)

    def _tell(self) -> None:
        while self._untold:
            record = self._untold.popleft()
            self._intervals.append(record["time"] - self._clock.newest)
            kind, self._clock.newest = record.get("kind"), record["time"]
            self._ended = kind == END
            if kind is None:
                self._reporter.step(stats_of(record))
            elif kind == EVALUATION:
                self._reporter.evaluated(evaluation_of(record))
        with suppress(OSError):  # there is no checkpoint yet
            name = os.readlink(self.run_dir / LATEST)
            if name != self._saved and (found := STEP_FOLDER.fullmatch(name)):
                self._saved = name
                self._reporter.saved(self.run_dir / name, int(found[1]))

    def _say(self) -> None:
        """Say what nothing but the lease tells: that a run has not begun, is silent, or was killed."""
        if self._info is not None:
            self._reporter.note(self._note())
        elif self._said != (said := self._prospect()):
            self._said = said
            self._reporter.status(said)

    def _resuming(self) -> bool:
        """Tell whether a process is about to go on from what is shown, which another one has trained."""
        return self.pulse.writer is not None and self.pulse.alive and self.pulse.writer.since > self._clock.newest

    def _note(self) -> str:
        writer, newest = self.pulse.writer, self._clock.newest
        if writer is None:
            return ""
        process = f"process {writer.pid} on {writer.host}"
        if self._resuming():
            return f"{process} is about to resume the run"
        silence = f"no report since {_when(newest)}; {process}"
        if not self.pulse.alive:
            return f"{silence} {self._fate()}"
        quiet = time.time() - newest > max(QUIET, LONG * max(self._intervals, default=0.0))
        return f"{silence} is still running" if quiet else ""

    def _prospect(self) -> str:
        writer = self.pulse.writer
        if self._untold:
            return "An older saekit trains this run: the view begins with its first checkpoint"
        if not self.run_dir.is_dir():
            return f"Waiting for {self.run_dir}: there is no such folder yet"
        if writer is None:
            return f"Waiting for {self.run_dir}: no process trains in it yet"
        process = f"process {writer.pid} on {writer.host}"
        if not self.pulse.alive:
            return f"Waiting for {self.run_dir}: {process} {self._fate()} before the first step"
        return f"Waiting for the first step: {process} is preparing {self.run_dir}"

    def _fate(self) -> str:
        return "was killed or crashed" if self.pulse.here else "was killed, or has lost its disk"


def watching(run_dir: Path, console: Console) -> Watch:
    """Return a watch of a run on a console: the live view on a terminal, and plain lines elsewhere."""
    return Watch(run_dir, lambda clock: terminal_reporter(console, clock))


def _when(time_of: float) -> str:
    """Return a time of day, with the date unless it is today's."""
    at, today = time.localtime(time_of), time.localtime()
    return time.strftime("%H:%M:%S" if at[:3] == today[:3] else "%Y-%m-%d %H:%M:%S", at)


def find_run(name: Path | None, save_dir: Path) -> Path:
    """Return the folder of the run that is meant, which need not be there yet.

    Args:
        name: A run's folder, one of its checkpoints, or a name below `save_dir`; None for the newest run there.
        save_dir: The folder that holds the runs.

    Raises:
        UserError: If there is no run to choose, or `name` is something else.
    """
    if name is None:
        times = {
            folder: max(file.stat().st_mtime for file in files)
            for folder in (save_dir.iterdir() if save_dir.is_dir() else ())
            if (files := [file for own in (METRICS_FILE, LOCK_FILE) if (file := folder / own).is_file()])
        }
        if not times:
            raise UserError(f"there is no run in {save_dir}: give a run's folder, or --save-dir")
        return max(times, key=lambda folder: times[folder])
    path = run_of(name) if name.exists() else name
    candidates = [path] if name.is_absolute() else [path, save_dir / name]
    run = next((each for each in candidates if each.is_dir()), candidates[-1 if len(name.parts) == 1 else 0])
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file: give a run's folder, or its name in --save-dir")
    return run
