"""The live view of a run on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.segment import Segments
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from saekit.report import units
from saekit.report.live_view import RunState, line, run_view
from saekit.report.pace import Pace
from saekit.report.stats import RunInfo, StepStats

REFRESH_PER_SECOND = 4


class LiveReporter:
    """Keeps one calm picture of the run on the terminal, and leaves its last state behind.

    Until training starts it shows a spinner with the newest status; after that a status is printed above the view,
    where it stays. A thread of rich's redraws the view; it reads immutable states only, which training replaces.

    Args:
        console: A terminal.
        clock: Seconds that only go forward; tests put their own here.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._state: RunState | None = None
        self._waiting: tuple[Spinner, float] | None = None
        self._finished = False
        self._drawn: tuple[RunState, tuple[object, ...], Segments] | None = None
        self._live = Live(
            console=console,
            refresh_per_second=REFRESH_PER_SECOND,
            get_renderable=self._picture,
            vertical_overflow="crop",
            # What is printed meanwhile goes above the view, but only if it was going to this terminal anyway.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def status(self, message: str) -> None:
        """Replace the spinner's line, or print above the view once it is there. A warning is always printed."""
        warning = message.lower().startswith("warning")
        if warning or self._state is not None or self._finished:
            self._console.print(Text(message, style="yellow" if warning else ""), soft_wrap=True)
        else:
            # One frame per refresh.
            spinner = Spinner("dots", style="cyan", speed=0.08 * REFRESH_PER_SECOND)
            self._waiting = (spinner, self._clock())
            spinner.text = line(message)
            self._live.start()

    def start(self, info: RunInfo) -> None:
        """Put the view in the spinner's place."""
        self._state = RunState(info, Pace(info, self._clock))
        self._live.start(refresh=True)

    def step(self, stats: StepStats) -> None:
        """Take the numbers; the next redrawing shows them."""
        if self._state is not None:
            self._state.pace.update(stats)
            self._state = self._state.after(stats)

    def saved(self, path: Path, step: int) -> None:
        """Name the newest checkpoint in the footer."""
        if self._state is not None:
            self._state = replace(self._state, saved=(path, step))

    def finish(self) -> None:
        """Draw every layer once more and give the terminal back; without a run, leave nothing."""
        if self._finished:
            return
        self._finished = True
        if self._state is None:
            self._live.transient = True
        else:
            self._state = replace(self._state, finished=True)
        self._live.stop()

    def _picture(self) -> RenderableType:
        if self._state is not None:
            return self._draw(self._state)
        if self._waiting is None:
            return ""
        spinner, since = self._waiting
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_row(spinner, Text(units.duration(self._clock() - since), style="dim"))
        return row

    def _draw(self, state: RunState) -> Segments:
        """The view as finished characters: laid out anew for new numbers, another size, or the ETA's next second.

        Laying out takes some milliseconds that the training thread has to wait for the interpreter's lock.
        """
        size = self._console.size
        key = (size, int(self._clock()))
        if self._drawn is None or self._drawn[0] is not state or self._drawn[1] != key:
            picture = Segments(list(self._console.render(run_view(state, size.width, size.height))))
            self._drawn = (state, key, picture)
        return self._drawn[2]
