"""Progress on a terminal: the live view for somebody who watches, and the choice of a reporter."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.segment import Segments
from rich.text import Text

from saekit.report.base import TerminalReporter
from saekit.report.live_view import LiveState, run_view
from saekit.report.notebook import NotebookReporter
from saekit.report.pace import Pace
from saekit.report.plain import PlainReporter
from saekit.report.stats import EvalStats, RunInfo, StepStats
from saekit.text import wrap

REFRESH_PER_SECOND = 4


class LiveReporter:
    """Keeps one calm picture of the run on the terminal, and leaves its last state behind.

    The view appears when training starts. Before that each status is a line of its own, so that downloading, tokenizing
    and loading can show the progress bars that their libraries have; after that it is printed above the view. A thread
    of rich's redraws the view; it reads immutable states only, which training replaces.

    Args:
        console: A terminal.
        clock: Seconds that only go forward; tests put their own here.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._state: LiveState | None = None
        self._finished = False
        self._drawn: tuple[LiveState, tuple[object, ...], Segments] | None = None
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
        """Print a line: above the view once it is there, before that above the libraries' own progress bars."""
        warning = message.lower().startswith("warning")
        style = "yellow" if warning else "dim" if self._state is None else ""
        self._console.print(Text(wrap(message, self._console.width), style=style), soft_wrap=True)

    def start(self, info: RunInfo) -> None:
        """Show the view."""
        self._state = LiveState(info, Pace(info, self._clock))
        self._live.start(refresh=True)

    def step(self, stats: StepStats) -> None:
        """Take the numbers; the next redrawing shows them."""
        if self._state is not None:
            self._state.pace.update(stats)
            self._state = self._state.after(stats)

    def evaluated(self, stats: EvalStats) -> None:
        """Show its means below the numbers of the training."""
        if self._state is not None:
            self._state.pace.pause(stats)
            self._state = replace(self._state, evaluation=stats)

    def saved(self, path: Path, step: int) -> None:
        """Name the newest checkpoint in the footer."""
        if self._state is not None:
            self._state = replace(self._state, saved=(path, step))

    def note(self, text: str) -> None:
        """Show a line in the footer, in place of the one before."""
        if self._state is not None and self._state.note != text:
            self._state = replace(self._state, note=text)

    def finish(self) -> None:
        """Draw every layer again and give the terminal back; without a run, leave nothing."""
        if self._state is not None and not self._finished:
            self._state = replace(self._state, finished=True)
        self.leave()

    def leave(self) -> None:
        """Give the terminal back; the last picture stays."""
        if self._state is not None and not self._finished:
            self._live.stop()
        self._finished = True

    def _picture(self) -> RenderableType:
        return "" if self._state is None else self._draw(self._state)

    def _draw(self, state: LiveState) -> Segments:
        """Return the view as finished characters, laid out again for new numbers, another size or the next second.

        Laying out takes some milliseconds that the training thread has to wait for the interpreter's lock.
        """
        size = self._console.size
        key = (size, int(self._clock()))
        if self._drawn is None or self._drawn[0] is not state or self._drawn[1] != key:
            picture = Segments(list(self._console.render(run_view(state, size.width, size.height))))
            self._drawn = (state, key, picture)
        return self._drawn[2]


def terminal_reporter(console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> TerminalReporter:
    """Return a live view for somebody who watches a terminal or a notebook, plain lines for everything else.

    Plain lines it is for a pipe or a file (also where FORCE_COLOR makes rich believe in a terminal), for TERM=dumb, in
    CI, and for a terminal whose encoding has no block characters.

    Args:
        console: Where to write. The default is stderr, so that stdout carries nothing but results.
        clock: Seconds that only go forward.
    """
    console = Console(stderr=True) if console is None else console
    if console.is_jupyter:
        return NotebookReporter(clock)
    watched = console.is_interactive and not console.is_dumb_terminal and console.file.isatty()
    if watched and not _in_ci() and not console.options.ascii_only:
        return LiveReporter(console, clock)
    return PlainReporter(console, clock=clock)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
