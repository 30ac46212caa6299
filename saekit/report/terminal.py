"""Chooses how progress is shown."""

from __future__ import annotations

import os

from rich.console import Console

from saekit.report.base import Reporter
from saekit.report.live import LiveReporter
from saekit.report.plain import PlainReporter


def terminal_reporter(console: Console | None = None) -> Reporter:
    """A live view for somebody who watches a terminal, plain lines for everything else.

    Plain lines it is for a pipe or a file (also where FORCE_COLOR makes rich believe in a terminal), for TERM=dumb, in
    CI, and for a terminal whose encoding has no block characters.

    Args:
        console: Where to write. The default is stderr, so that stdout carries nothing but results.
    """
    console = Console(stderr=True) if console is None else console
    watched = console.is_interactive and not console.is_dumb_terminal and console.file.isatty()
    if watched and not _in_ci() and not console.options.ascii_only:
        return LiveReporter(console)
    return PlainReporter(console)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")
