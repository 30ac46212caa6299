"""Findings of checks. An error in a check becomes a finding, too."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SAEKIT, LIBRARIES, DEVICES, RANKS = "saekit", "libraries", "devices", "ranks"
EIGHT_BITS, HUB, RESOURCES = "8 bits", "hub", "resources"
AREAS = (SAEKIT, LIBRARIES, DEVICES, RANKS, EIGHT_BITS, HUB, RESOURCES)
"""The areas of a machine's findings, in the order in which they are shown."""
COLLECTIVES, NODES = "collectives", "nodes"
TOGETHER = (RANKS, COLLECTIVES, NODES)
"""The areas of the findings of ranks that a launcher has started."""

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    area: str
    """One of `AREAS` or `TOGETHER`."""
    name: str
    state: Literal["ok", "note", "problem"]
    """`note`: good to know, but nearly all of saekit works. `problem`: something does not work until it is fixed."""
    found: str
    """What the check found, in one short phrase."""
    remedy: str | None = None
    """What to do: a command to type or something to install. None if the state is `ok`."""
    blocks: bool = False
    """Whether `saekit train` cannot run at all until this is fixed."""


def make_check(area: str, name: str, check: Callable[[], Iterable[Finding]], *, debug: bool = False) -> list[Finding]:
    """Run one check. An error in it becomes a finding, so that the other checks still run.

    Args:
        area: The area of that finding.
        name: The name of that finding.
        check: The check.
        debug: Raise the error instead, to show its traceback.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the warnings of libraries are not part of the report
            return list(check())
    except Exception as error:  # a broken library or an unusual machine can raise anything, and that is a finding
        if debug:
            raise
        found = f"could not be checked ({describe_error(error)})"
        return [Finding(area, name, "problem", found, "saekit doctor --debug shows where it went wrong")]


def describe_error(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def shown(path: Path) -> str:
    """Return a path to show in a report, with `~` for the home folder, whose name would reveal its owner."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home
        return str(path)
    inside = path != home and home != home.parent and path.is_relative_to(home)
    return str(Path("~") / path.relative_to(home)) if inside else str(path)
