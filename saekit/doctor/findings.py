"""Findings of checks; a check that raises an error becomes a finding as well."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SAEKIT, LIBRARIES, DEVICES, RANKS = "saekit", "libraries", "devices", "ranks"
EIGHT_BITS, HUB, RESOURCES = "8 bits", "hub", "resources"
AREAS = (SAEKIT, LIBRARIES, DEVICES, RANKS, EIGHT_BITS, HUB, RESOURCES)
"""Of a machine, in the order in which they are shown."""
COLLECTIVES, NODES = "collectives", "nodes"
TOGETHER = (RANKS, COLLECTIVES, NODES)
"""Of ranks that a launcher has started."""

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    area: str
    """One of `AREAS` or `TOGETHER`."""
    name: str
    state: Literal["ok", "note", "problem"]
    """`note`: good to know, and most of saekit works; `problem`: something does not work until it is fixed."""
    found: str
    """One short phrase."""
    remedy: str | None = None
    """The command to type or the thing to install; None if all is well."""
    blocks: bool = False
    """Whether `saekit train` cannot run at all until this is fixed."""


def make_check(area: str, name: str, check: Callable[[], Iterable[Finding]], *, debug: bool = False) -> list[Finding]:
    """Make one check; what it raises is a problem of its own, so that the other checks still get their turn.

    Args:
        area: Where it belongs.
        name: What the finding is called if the check fails.
        check: The check.
        debug: Let an exception out, so that its traceback is seen.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a library has to say is no part of the report
            return list(check())
    except Exception as error:  # whatever a broken library or an odd machine makes a check raise is what is looked for
        if debug:
            raise
        found = f"could not be checked ({describe_error(error)})"
        return [Finding(area, name, "problem", found, "saekit doctor --debug shows where it went wrong")]


def describe_error(error: BaseException) -> str:
    """Return an exception's type and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def shown(path: Path) -> str:
    """Return a path as it can be shown to others: with `~` for the home folder, which names its owner."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home
        return str(path)
    inside = path != home and home != home.parent and path.is_relative_to(home)
    return str(Path("~") / path.relative_to(home)) if inside else str(path)
