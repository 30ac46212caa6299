"""The command line as it was typed, turned into one that Typer parses: lists with spaces, `train` left out."""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Collection, Iterator

from saekit.config.elsewhere import answer
from saekit.config.options import options_of
from saekit.config.run import PARTS

_OPTIONS = {f"--{option.name.replace('_', '-')}": option.type for part in PARTS for option in options_of(part)}
LISTS = frozenset(
    name for name, kind in _OPTIONS.items() if isinstance(kind, types.GenericAlias) and kind.__args__[0] in (int, float)
)
"""Options whose value is a list of numbers."""
SWITCHES = frozenset(name for name, kind in _OPTIONS.items() if kind is bool)
"""Options without a value."""
OF_TRAIN = _OPTIONS.keys() | {"--config", "--launch", "--num-processes", "--distribute-layers", "--dry-run"}
NUMBERS = re.compile(r"\d[\d.,:-]*")
MODULES = re.compile(r"[^/\\]*(?<![^.])(\d+|\*+|\{[^/]*\}|\[[^/]*\])(?![^.:,])[^/\\]*")
"""Paths of modules with a number or a pattern as one of their parts, as no file or data set is called."""
PATTERNS = ("--hookpoints", "--reads", "--writes", "--crosscode")
JOINED = {**dict.fromkeys(LISTS, NUMBERS), **dict.fromkeys(PATTERNS, MODULES)}
"""What the values of an option look like that may be a list with spaces."""


def rewritten(arguments: list[str], commands: Collection[str]) -> list[str]:
    """Return a command line without what only other tools' parsers know.

    `--layers 16 24` becomes `--layers 16,24`, `--hookpoints h.0 h.1` becomes `--hookpoints h.0,h.1`, `--save-best True`
    becomes `--save-best`, and `MODEL DATASET` without a command becomes `train MODEL DATASET`.

    Args:
        arguments: What was typed after the program's name.
        commands: The names of the commands.
    """
    arguments = list(_with_plain_values(arguments))
    return ["train", *arguments] if _trains(arguments, commands) else arguments


def _with_plain_values(arguments: list[str]) -> Iterator[str]:
    """Join the values of lists by commas, and leave out those of switches."""
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if argument == "--":
            yield from (argument, *left)
            return
        option, equals, value = argument.partition("=")
        name = option.replace("_", "-")
        if name in JOINED and (equals or left):
            values, like = [value if equals else left.pop(0)], JOINED[name]
            while left and left[0][:1] != "-" and like.fullmatch(left[0]) and like.fullmatch(values[0]):
                values.append(left.pop(0))
            yield from (f"{option}={','.join(values)}",) if equals else (option, ",".join(values))
        elif name in SWITCHES and (said := (value if equals else left[0] if left else "").lower()) in ("true", "false"):
            del left[: 0 if equals else 1]
            yield option if said == "true" else f"--no-{name.removeprefix('--')}"
        else:
            yield argument


def _trains(arguments: list[str], commands: Collection[str]) -> bool:
    """Tell whether a command line without a command means `train`: it begins with an option of its, or with a model.

    A single word that is nearly a command's name is a mistake that Typer names.
    """
    first = arguments[0] if arguments else "-"
    if first.startswith("--"):
        if any(argument in commands for argument in arguments):
            return False
        name = first.partition("=")[0].replace("_", "-")
        return name in OF_TRAIN or f"--{name.removeprefix('--no-')}" in SWITCHES or answer(name) is not None
    if first.startswith("-") or first in commands:
        return False
    if "/" in first or os.path.exists(first):
        return True
    return len(arguments) > 1 and not difflib.get_close_matches(first, commands, cutoff=0.5)
