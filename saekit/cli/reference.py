"""What a command takes, in groups: help on a terminal, man pages and the reference in the docs are made from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saekit.config.options import options_of
from saekit.config.run import PARTS

ARGUMENTS, GENERAL = "Arguments", "Options"
_FIELDS = [option for part in PARTS for option in options_of(part)]
PANELS = tuple(dict.fromkeys(option.panel for option in _FIELDS))
"""The groups of the configuration's options, in the order in which they are shown."""
COMMON = frozenset(option.name for option in _FIELDS if option.common) | {"config", "launch", "dry_run"}
"""The options of `saekit train` that most runs need."""
ALWAYS = frozenset({"model", "dataset", "help", "help_all"})
_NEXT_SENTENCE = re.compile(r"(?<=[^.]\.)(?<!al\.)\s+")


@dataclass(frozen=True)
class Entry:
    """An argument or an option of a command, as text without markup."""

    names: tuple[str, ...]
    """Every spelling: `--output` and `-o`, or `--shuffle` and `--no-shuffle`; an argument's name in capitals."""
    value: str
    """What its value is called, such as `PATH`; empty for one that takes none."""
    help: str
    note: str
    """Unit and default in square brackets, or nothing."""

    @property
    def label(self) -> str:
        """Return what a line of help begins with, such as `-o, --output FILE` or `--[no-]shuffle`."""
        names = sorted(self.names, key=lambda name: (name.startswith("--"), len(name)))
        positive = names[0].removeprefix("--")
        if names[1:] == [f"--no-{positive}"]:
            names = [f"--[no-]{positive}"]
        return f"{', '.join(names)} {self.value}".strip()

    @property
    def brief(self) -> str:
        """Return the first sentence of its help, which stands by itself."""
        return _NEXT_SENTENCE.split(self.help, maxsplit=1)[0]


@dataclass(frozen=True)
class Section:
    """A group of arguments or options."""

    title: str
    entries: tuple[Entry, ...]


def sections(parameters: Sequence[Any]) -> list[Section]:
    """Group the parameters of a command: arguments, its own groups, those of the configuration, all others.

    Args:
        parameters: Typer's, such as `command.params`.
    """
    found: dict[str, list[Entry]] = {}
    for parameter in parameters:
        if not parameter.hidden:
            found.setdefault(_title(parameter), []).append(_entry(parameter))
    order = {ARGUMENTS: -2, GENERAL: len(PANELS), **{panel: place for place, panel in enumerate(PANELS)}}
    return [Section(title, tuple(found[title])) for title in sorted(found, key=lambda title: order.get(title, -1))]


def common(command: str, parameters: Sequence[Any]) -> list[Any]:
    """Return the parameters that most users need: of a command with the options of a run, not all of these.

    Args:
        command: Its name.
        parameters: Typer's.
    """
    configured = {option.name for option in _FIELDS}
    if not configured <= {each.name for each in parameters}:
        return list(parameters)
    if command == "train":
        return [each for each in parameters if each.name in COMMON | ALWAYS]
    return [each for each in parameters if each.name not in configured]


def visible_commands(group: Any) -> dict[str, Any]:
    """Return the commands that help and docs list, by name."""
    return {name: command for name, command in group.commands.items() if not command.hidden}


def paragraphs(command: Any) -> list[str]:
    """Return what a command does; the first paragraph says it in one sentence."""
    return [" ".join(part.split()) for part in (command.help or "").replace("\f", "").split("\n\n")]


def usage(path: str, parameters: Sequence[Any]) -> str:
    """Return how a command is called, such as `saekit inspect PATH [OTHER] [OPTIONS]`."""
    arguments = [_argument(each) for each in parameters if each.param_type_name == "argument" and not each.hidden]
    return " ".join([path, *arguments, "[OPTIONS]"])


def _title(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return ARGUMENTS
    return getattr(parameter, "rich_help_panel", None) or GENERAL


def _entry(parameter: Any) -> Entry:
    help = parameter.help or ""
    if parameter.param_type_name == "argument":
        return Entry((_argument(parameter).strip("[]"),), "", help, "")
    names = tuple(name.strip() for name in (*parameter.opts, *parameter.secondary_opts) if name.strip())
    value = "" if parameter.is_flag else parameter.metavar or "TEXT"
    return Entry(names, value, help, _note(parameter))


def _note(option: Any) -> str:
    if isinstance(option.show_default, str):
        return f"[{option.show_default}]"
    if option.is_flag or not option.show_default or option.default is None:
        return ""
    default = f"{option.default:,}" if isinstance(option.default, int) else option.default
    return f"[default: {default}]"


def _argument(argument: Any) -> str:
    return argument.metavar or (argument.name.upper() if argument.required else f"[{argument.name.upper()}]")
