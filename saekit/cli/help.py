"""Help on a terminal: names in one column, text in the other; a name that is too long has a line of its own.

`--help` of a command with the options of a run shows those that most users need, each in one sentence. `--help-all`
shows every option by group, with all that there is to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from saekit.cli.examples import EXAMPLES
from saekit.cli.reference import (
    ARGUMENTS,
    GENERAL,
    Entry,
    Section,
    common,
    paragraphs,
    sections,
    usage,
    visible_commands,
)

MOST_COLUMNS = 100
"""Longer lines are hard to read."""
COLUMN = 26
"""Where the text begins."""
NAME, TITLE, NOTE, COMMAND = "bold cyan", "bold", "dim", "cyan"


class HelpCommand(TyperCommand):
    """A command with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write what most users need."""
        formatter.write(_rendered(_command(self, ctx, everything=False)))


class HelpGroup(TyperGroup):
    """The program with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        formatter.write(_rendered(_program(self, ctx)))


def print_all(ctx: typer.Context, asked: bool) -> None:
    """Print help with every option, and stop: the callback of `--help-all`."""
    if asked:
        typer.echo(_rendered(_command(ctx.command, ctx, everything=True)))
        raise typer.Exit


def _rendered(lines: Iterable[Text]) -> str:
    console = Console()
    with console.capture() as captured:
        for line in lines:
            console.print(line, soft_wrap=True)
    return captured.get().rstrip("\n")


def _program(group: Any, ctx: Any) -> Iterator[Text]:
    yield from _wrapped(Text.assemble(("Usage: ", TITLE), f"{ctx.command_path} COMMAND ..."))
    yield from _prose(paragraphs(group))
    commands = (Entry((name,), "", paragraphs(each)[0], "") for name, each in visible_commands(group).items())
    yield from _listed(Section("Commands", tuple(commands)))
    for section in sections(group.get_params(ctx)):
        yield from _listed(section)
    yield from _examples(ctx.command_path)
    yield from _prose([f"{ctx.command_path} COMMAND --help shows the options of a command."])


def _command(command: Any, ctx: Any, *, everything: bool) -> Iterator[Text]:
    parameters = command.get_params(ctx)
    shown = parameters if everything else common(ctx.info_name, parameters)
    brief = len(shown) < len(parameters)
    yield from _wrapped(Text.assemble(("Usage: ", TITLE), usage(ctx.command_path, parameters)))
    yield from _prose(paragraphs(command))
    for section in _as_one_list(sections(shown)) if brief else sections(shown):
        yield from _listed(section, brief=brief)
    yield from _examples(ctx.info_name)
    if brief:
        number = len(parameters) - len(shown)
        yield from _prose([f"{ctx.command_path} --help-all shows {number} more options, and more about these."])


def _as_one_list(groups: list[Section]) -> list[Section]:
    """Join all groups of options: few need no groups."""
    options = tuple(entry for group in groups if group.title != ARGUMENTS for entry in group.entries)
    return [*(group for group in groups if group.title == ARGUMENTS), Section(GENERAL, options)]


def _listed(section: Section, *, brief: bool = False) -> Iterator[Text]:
    """Yield a group's lines: its title, and each entry with its text next to it, or below a long name."""
    width = _width()
    indent = COLUMN if width >= 2 * COLUMN else 6
    yield Text(f"\n{section.title}", TITLE)
    for entry in section.entries:
        head = Text(f"  {entry.label}", NAME)
        lines = list(_with_note(entry.brief if brief else entry.help, entry.note, width - indent))
        if head.cell_len + 2 <= indent:
            head.pad_right(indent - head.cell_len)
            yield head + lines.pop(0)
        else:
            yield head
        yield from (Text(" " * indent) + line for line in lines)


def _with_note(text: str, note: str, width: int) -> Iterator[Text]:
    """Yield the lines of a text; unit and default are on its last line, or below it if there is no room."""
    *lines, last = _wrapped(Text(text), width)
    yield from lines
    if note and last.cell_len + 1 + len(note) > width:
        yield last
        yield Text(note, NOTE)
    else:
        yield last + Text(f" {note}" if note else "", NOTE)


def _prose(texts: Iterable[str]) -> Iterator[Text]:
    for text in texts:
        yield Text()
        yield from _wrapped(Text(text))


def _examples(name: str) -> Iterator[Text]:
    yield Text("\nExamples", TITLE)
    for what, line in EXAMPLES[name]:
        yield Text(f"  # {what}", NOTE)
        yield Text(f"  {line}", COMMAND)


def _wrapped(text: Text, width: int | None = None) -> Iterator[Text]:
    for line in text.wrap(Console(), width or _width()):
        line.rstrip()
        yield line


def _width() -> int:
    return min(Console().width, MOST_COLUMNS)
