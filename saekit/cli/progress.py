"""How far something is that takes a while. Apart from `output`, for what it imports costs every start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Bar:
    """A line of text with a bar, on a terminal; the text alone where stderr is a file."""

    def __init__(self, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._task = self.bar.add_task("", total=None)

    def status(self, text: str) -> None:
        """What is going on now."""
        self.bar.update(self._task, description=text)
        if not self.console.is_terminal:
            self.console.print(text, soft_wrap=True, highlight=False)

    def update(self, done: int, of: int) -> None:
        """How far it is."""
        self.bar.update(self._task, completed=done, total=of)


@contextmanager
def progress(shown: bool = True) -> Iterator[Bar]:
    """A bar on stderr for as long as the work inside takes, gone afterwards; nothing unless it is to be shown."""
    bar = Bar(shown)
    with bar.bar:
        yield bar
