"""Fit names, lines and commands into the columns of a terminal."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def tail(name: str, width: int) -> str:
    """Cut a hookpoint's name to at most `width` characters, from the start: its number is at the end."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def _prefix_length(texts: Sequence[str]) -> int:
    """Return the length of the texts' common prefix, which is that of the alphabetically first and last text."""
    first, last = min(texts), max(texts)
    return next((place for place, letter in enumerate(first) if letter != last[place]), len(first))


def _common_ends(names: Sequence[str]) -> tuple[int, int]:
    """Return the lengths of the names' common prefix and common suffix, neither of which splits a number."""
    if len(set(names)) < 2:
        return 0, 0
    start = _prefix_length(names)
    while start and names[0][start - 1].isdigit():
        start -= 1
    rest = [name[start:] for name in names]
    end = _prefix_length([each[::-1] for each in rest])
    while end and rest[0][-end].isdigit():
        end -= 1
    return start, end


def least_width(names: Sequence[str]) -> int:
    """Return the smallest width at which `shorten` keeps everything that tells the names apart."""
    start, end = _common_ends(names)
    return min(max(map(len, names)), max(len(name) - start - end for name in names) + bool(start) + bool(end))


def shorten(names: Sequence[str], width: int) -> list[str]:
    """Shorten names to `width` characters and keep them distinct: `…10.mlp…`, not `….mlp:in` for every layer.

    Cuts the common prefix first, then the common suffix. Below `least_width` it also cuts what tells the names apart.
    """
    start, end = _common_ends(names)
    return [_shorten(name, width, start, end) for name in names]


def _shorten(name: str, width: int, start: int, end: int) -> str:
    if len(name) <= width or len(name) - start < width or not end:
        return tail(name, width)
    room = max(1, width - bool(start) - 1)
    middle = name[start : len(name) - end]
    shown = middle[-room:] if len(middle) > room else name[start : start + room]
    return f"{'…' if start else ''}{shown}…"


def that_fits(texts: Sequence[str], width: int) -> str:
    """Return the first text of at most `width` characters, or the last one."""
    return next((text for text in texts if len(text) <= width), texts[-1])


def wrap(text: str, width: int, indent: str = "") -> str:
    """Break lines between words. A word longer than a line stays whole, so that the terminal breaks it.

    Args:
        text: The text. Its own line breaks stay.
        width: Columns of the terminal.
        indent: The start of each line after a break.
    """
    wrapper = textwrap.TextWrapper(
        max(20, width),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )
    return "\n".join(wrapper.fill(line) for line in text.split("\n"))


def for_screen(text: str, console: Console, indent: str = "") -> str:
    """Break lines between words on a terminal, and leave them whole in a pipe or a file."""
    return wrap(text, console.width, indent) if console.file.isatty() else text


def command(words: Sequence[str], console: Console, indent: str = "") -> str:
    """Return a command that can be pasted into a shell, continued on further lines if the terminal is too narrow.

    Args:
        words: The words of the command, not quoted.
        console: Where the command is shown.
        indent: The start of each line.
    """
    quoted = [shlex.quote(word) for word in words]
    if not console.file.isatty():
        return indent + " ".join(quoted)
    lines = [indent + quoted[0]]
    for word in quoted[1:]:
        if len(lines[-1]) + len(word) + len("  \\") > console.width:
            lines[-1] += " \\"
            lines.append(f"{indent}  {word}")
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)
