"""A language model's modules as a tree, and what patterns of hookpoints mean in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saekit.activations.matching import SHORT, matched
from saekit.activations.patterns import fold
from saekit.activations.structure import IS_LIST, NO_TENSOR_OF_TOKENS, Reading, Structure
from saekit.errors import UserError
from saekit.sae.storage import IN
from saekit.text import for_screen


class Line(NamedTuple):
    """Modules that differ in numbers only."""

    pattern: str
    read: Reading
    """Of the first of them."""
    given: Reading


def render_modules(model: str, structure: Structure, console: Console) -> None:
    """Print the tree of modules, repeated ones folded into one line, and what the short names mean."""
    stream = f"residual stream of width {structure.width:,}"
    _say(console, f"{model}: {structure.depth} blocks ({structure.prefix}), {stream}\n", "bold")
    table = Table(box=None, pad_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("reads", justify="right")
    table.add_column("gives", justify="right")
    table.add_column("", overflow="fold", style="dim")
    parents: list[str] = []
    for line in _lines(structure):
        while parents and not line.pattern.startswith(f"{parents[-1]}."):
            parents.pop()
        label = line.pattern.removeprefix(f"{parents[-1]}." if parents else "")
        reasons = dict.fromkeys(
            each.reason.removesuffix(NO_TENSOR_OF_TOKENS) for each in (line.read, line.given) if each.reason
        )
        table.add_row(
            Text("  " * len(parents) + label), _width(line.read), _width(line.given), Text("; ".join(reasons))
        )
        parents.append(line.pattern)
    console.print(table)
    console.print()
    for name, meaning in _short(structure).items():
        _say(console, f"{name:10}{SHORT[name]}: {meaning}")
    _say(console, "\nA module's path names its output; the path followed by :in names its input.", "dim")


def render_matches(structure: Structure, patterns: Sequence[str], console: Console) -> None:
    """Print what patterns mean, by width; and what of it cannot be read.

    Raises:
        UserError: If a pattern cannot be read, or there is nothing of that name.
    """
    readings = _matched(structure, patterns)
    good = [each for each in readings if each.reason is None]
    table = Table(box=None, pad_edge=False)
    table.add_column("hookpoint", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("width", justify="right")
    table.add_column("", overflow="fold", style="dim")
    for width in dict.fromkeys(each.width for each in good):
        for pattern, own in fold([each.name for each in good if each.width == width]).items():
            writes = "writes to the residual stream" if structure.writers.issuperset(own) else ""
            table.add_row(Text(pattern), f"{len(own):,}", f"{width:,}", writes)
    if good:
        console.print(table)
    for reason in dict.fromkeys(each.reason for each in readings if each.reason is not None):
        names = ", ".join(fold([each.name for each in readings if each.reason == reason]))
        _say(console, f"{names} cannot be read: it {reason}", "red")


def describe(model: str, structure: Structure, patterns: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the same as plain values.

    Raises:
        UserError: If a pattern cannot be read, or there is nothing of that name.
    """
    paths = [name for name in structure.readings if not name.endswith(IN)]
    matches = (
        {} if patterns is None else {"matched": [_plain(structure, each) for each in _matched(structure, patterns)]}
    )
    return {
        "model": model,
        "blocks": structure.prefix,
        "num_layers": structure.depth,
        "d_in": structure.width,
        "short_names": _short(structure),
        "modules": [
            {
                "path": path,
                "class": structure.kinds[path],
                "in": _plain(structure, structure.readings[path + IN]),
                "out": _plain(structure, structure.readings[path]),
            }
            for path in paths
        ],
        **matches,
    }


def _plain(structure: Structure, reading: Reading) -> dict[str, Any]:
    return {
        "name": reading.name,
        "width": reading.width,
        "reason": reading.reason,
        "writes_to_residual_stream": reading.name in structure.writers,
    }


def _matched(structure: Structure, patterns: Sequence[str]) -> list[Reading]:
    names = dict.fromkeys(name for pattern in patterns for name in matched(structure, pattern))
    return sorted((structure.readings[name] for name in names), key=lambda each: each.order)


def _short(structure: Structure) -> dict[str, str]:
    """Say what each short name means, or why it means nothing."""
    meanings = {}
    for name in SHORT:
        try:
            meanings[name] = ", ".join(fold(matched(structure, name)))
        except UserError as error:
            meanings[name] = str(error).partition(": ")[2]
    return meanings


def _lines(structure: Structure) -> Iterator[Line]:
    """Yield the modules, repeated ones folded; of those that are not run, the outermost only."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    idle: list[str] = []
    for name, given in structure.readings.items():
        read = structure.readings[name + IN] if not name.endswith(IN) else None
        if read is None or given.reason == IS_LIST or any(name.startswith(f"{other}.") for other in idle):
            continue
        if given.order < 0:
            idle.append(name)
        key = (re.sub(r"\d+", "#", name), read.width, given.width, read.reason, given.reason)
        groups.setdefault(key, []).append(name)
    for names in groups.values():
        for pattern, own in fold(names).items():
            yield Line(pattern, structure.readings[own[0] + IN], structure.readings[own[0]])


def _width(reading: Reading) -> str:
    return "–" if reading.width is None else f"{reading.width:,}"


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(for_screen(text, console), style=style), soft_wrap=True)
