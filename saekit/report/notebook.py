"""Progress in a notebook: one output below the cell, which is replaced as the run goes on."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from saekit.report.live_view import ROOMY, LiveState, run_view
from saekit.report.pace import Pace
from saekit.report.stats import EvalStats, RunInfo, StepStats

WIDTH = 100
"""Columns of the view."""
LINES = 20
"""Newest messages that are kept above it."""
SECONDS = 0.25
"""Between two updates at least, except for the first and the last: each is a message to the browser."""
PAGE = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>\n"
)


class NotebookReporter:
    """Shows what `LiveReporter` shows on a terminal, as HTML and as plain text, with every layer.

    It is drawn when there is something new, not by a clock.

    Args:
        clock: Seconds that only go forward; tests put their own here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._state: LiveState | None = None
        self._said: list[Text] = []
        self._output: Any = None
        """IPython's handle of the output."""
        self._shown_at = 0.0
        self._finished = False

    def status(self, message: str) -> None:
        """Add a line above the view."""
        style = "yellow" if message.lower().startswith("warning") else "dim"
        self._said = [*self._said, Text(message, style)][-LINES:]
        self._show(now=True)

    def start(self, info: RunInfo) -> None:
        """Show the view."""
        self._state = LiveState(info, Pace(info, self._clock))
        self._show(now=True)

    def step(self, stats: StepStats) -> None:
        """Show the numbers."""
        if self._state is not None:
            self._state.pace.update(stats)
            self._state = self._state.after(stats)
            self._show()

    def evaluated(self, stats: EvalStats) -> None:
        """Show its means below the numbers of the training."""
        if self._state is not None:
            self._state.pace.pause(stats)
            self._state = replace(self._state, evaluation=stats)
            self._show(now=True)

    def saved(self, path: Path, step: int) -> None:
        """Name the newest checkpoint."""
        if self._state is not None:
            self._state = replace(self._state, saved=(path, step))
            self._show()

    def note(self, text: str) -> None:
        """Show a line below the view, in place of the one before."""
        if self._state is not None and self._state.note != text:
            self._state = replace(self._state, note=text)
            self._show(now=True)

    def finish(self) -> None:
        """Leave the last state in the notebook."""
        if not self._finished and self._state is not None:
            self._state = replace(self._state, finished=True)
            self._show(now=True)
        self.leave()

    def leave(self) -> None:
        """Leave the picture as it is."""
        self._finished = True

    def _show(self, *, now: bool = False) -> None:
        if not now and self._clock() - self._shown_at < SECONDS:
            return
        self._shown_at = self._clock()
        if self._output is None:
            from IPython.display import display

            self._output = display(self._picture(), raw=True, display_id=True)
        else:
            self._output.update(self._picture(), raw=True)

    def _picture(self) -> dict[str, str]:
        """Return the view by MIME type."""
        console = Console(
            file=io.StringIO(),
            width=WIDTH,
            record=True,
            force_terminal=True,
            force_jupyter=False,
            color_system="truecolor",
        )
        view = [] if self._state is None else [run_view(self._state, WIDTH, _height(self._state.info))]
        console.print(Group(*self._said, *view))
        text = console.export_text(clear=False)
        return {"text/plain": text, "text/html": console.export_html(code_format=PAGE, inline_styles=True)}


def _height(info: RunInfo) -> int:
    """Return lines enough for every layer: a notebook scrolls."""
    return ROOMY + len(info.hookpoints)
