"""Patterns of hookpoints' names: `layers.{0-11:2}.mlp:in`.

A pattern is a module's path relative to the base model. As in file names, `*` matches one part of the path or any
characters within one, `**` any number of parts, and `?` and `[abc]` one character. Braces contain alternatives: words,
numbers and ranges, such as `{q,k}_proj`, `{0-11:2}`, `{0,4-7}`. `:in` at the end means the module's input instead of
its output. Patterns for `fnmatch` such as `layers.*.mlp` mean the same here.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from saekit.config.options import numbers_in
from saekit.errors import UserError
from saekit.sae.storage import IN

BRACES = re.compile(r"\{([^{}]*)\}")
HOLE = "\0"
"""A placeholder for the numbers that differ."""


def alternatives(pattern: str) -> list[str]:
    """Expand a pattern's braces: `layers.{0-2:2}.mlp` gives `layers.0.mlp` and `layers.2.mlp`.

    Raises:
        UserError: If the pattern is invalid.
    """
    found = BRACES.search(pattern)
    if found is None:
        _check(pattern)
        return [pattern]
    start, end = pattern[: found.start()], pattern[found.end() :]
    return [each for part in _parts(pattern, found[1]) for each in alternatives(f"{start}{part}{end}")]


def matches(alternative: str, name: str) -> bool:
    """Return whether a pattern without braces matches a hookpoint's name: its module and its side."""
    path, side = _sides(alternative)
    module, own = _sides(name)
    return side == own and _match(path.split("."), module.split("."))


def fold(names: Sequence[str]) -> dict[str, list[str]]:
    """Group names that differ only in numbers, by a pattern that matches exactly the names of the group.

    `layers.0.mlp` and `layers.1.mlp` become `layers.{0,1}.mlp`. Groups are in the order of their first names.
    """
    groups = {name: [name] for name in names}
    for place in range(max((name.count(".") + 1 for name in names), default=0)):
        together: dict[str, dict[int, list[str]]] = {}
        for pattern, own in groups.items():
            parts = pattern.split(".")
            found = re.fullmatch(rf"(\d+)({IN})?", parts[place]) if place < len(parts) else None
            if found is not None:
                parts[place] = HOLE + (found[2] or "")
            together.setdefault(".".join(parts), {})[int(found[1]) if found else 0] = own
        groups = {
            pattern.replace(HOLE, ranges(sorted(by_number))): [
                name for _, own in sorted(by_number.items()) for name in own
            ]
            for pattern, by_number in together.items()
        }
    return groups


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as `3`, `{0-5}`, `{0-10:2}` or `{0,1,5-7}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    step = numbers[1] - numbers[0]
    if len(numbers) > 2 and all(b - a == step for a, b in pairwise(numbers)):
        return f"{{{numbers[0]}-{numbers[-1]}{f':{step}' if step > 1 else ''}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = (str(run[0]) if len(run) == 1 else f"{run[0]}{'-' if len(run) > 2 else ','}{run[-1]}" for run in runs)
    return f"{{{','.join(shown)}}}"


def _parts(pattern: str, inside: str) -> Iterator[str]:
    for part in inside.split(","):
        if re.fullmatch(r"\s*[0-9]+\s*-[0-9\s:]*", part):
            try:
                yield from map(str, numbers_in(part.strip()))
            except ValueError as error:
                raise UserError(f"--hookpoints {pattern}: {error}") from None
        else:
            yield part.strip()


def _check(pattern: str) -> None:
    path, _ = _sides(pattern)
    problem = None
    if "{" in path or "}" in path:
        problem = "braces are unbalanced or nested: write alternatives as {a,b} and ranges as {0-5}"
    elif ":" in path:
        problem = f"{path[path.index(':') :]!r} is not valid: write :in for a module's input, nothing for its output"
    elif not all(path.split(".")):
        problem = "a part of the path is empty: write a module's path such as layers.3.mlp"
    if problem is not None:
        raise UserError(f"--hookpoints {pattern}: {problem}")


def _sides(name: str) -> tuple[str, bool]:
    return name.removesuffix(IN), name.endswith(IN)


def _match(pattern: Sequence[str], path: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_match(pattern[1:], path[start:]) for start in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _match(pattern[1:], path[1:])
