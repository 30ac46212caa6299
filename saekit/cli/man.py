"""`saekit man`: a man page of each command, made from what its help is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit._version import __version__
from saekit.cli.examples import EXAMPLES
from saekit.cli.reference import ARGUMENTS, Entry, paragraphs, sections, usage, visible_commands
from saekit.errors import UserError


def man(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder to write to, such as ~/.local/share/man/man1.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a man page of saekit and of each of its commands."""
    pages = man_pages(context.find_root())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): choose another folder") from None
    typer.echo(f"Wrote {len(pages)} man pages to {folder}")


def man_pages(root: Any) -> dict[str, str]:
    """Return every page as roff, by the name of its file.

    Args:
        root: The context of the program.
    """
    program = root.command_path
    commands = visible_commands(root.command)
    pages = {f"{program}.1": "\n".join(_program_page(program, root, commands)) + "\n"}
    for name, command in commands.items():
        # A context has the options that click adds, such as --help.
        parameters = command.get_params(command.context_class(command, info_name=name, parent=root))
        page = "\n".join(_command_page(program, name, command, parameters))
        pages[f"{program}-{name}.1"] = f"{page}\n"
    return pages


def _program_page(program: str, root: Any, commands: dict[str, Any]) -> Iterator[str]:
    yield from _head(program, paragraphs(root.command), f"{program} COMMAND ...")
    yield from _entries(
        "COMMANDS", (Entry((f"{program}-{name}(1)",), "", paragraphs(commands[name])[0], "") for name in commands)
    )
    for section in sections(root.command.get_params(root)):
        yield from _entries(section.title.upper(), section.entries)
    yield from _examples(program)
    yield from _see_also(f"{program}-{name}" for name in commands)


def _command_page(program: str, name: str, command: Any, parameters: list[Any]) -> Iterator[str]:
    yield from _head(f"{program}-{name}", paragraphs(command), usage(f"{program} {name}", parameters))
    groups = sections(parameters)
    for section in groups:
        if section.title == ARGUMENTS:
            yield from _entries("ARGUMENTS", section.entries)
    yield ".SH OPTIONS"
    options = [section for section in groups if section.title != ARGUMENTS]
    for section in options:
        yield from _entries(section.title if len(options) > 1 else "", section.entries, macro=".SS")
    yield from _examples(name)
    yield from _see_also([program])


def _head(page: str, texts: list[str], synopsis: str) -> Iterator[str]:
    yield f'.TH {page.upper()} 1 "{date.today()}" "saekit {__version__}" "saekit"'
    yield f".SH NAME\n{_roff(page)} \\- {_roff(texts[0].rstrip('.'))}"
    yield f".SH SYNOPSIS\n{_roff(synopsis)}\n.SH DESCRIPTION"
    yield "\n.PP\n".join(map(_roff, texts))


def _entries(title: str, entries: Iterable[Entry], macro: str = ".SH") -> Iterator[str]:
    if title:
        yield f"{macro} {_roff(title)}"
    for entry in entries:
        names = ", ".join(f"\\fB{_roff(name)}\\fR" for name in entry.names)
        value = f" \\fI{_roff(entry.value)}\\fR" if entry.value else ""
        yield f".TP\n{names}{value}\n{_roff(f'{entry.help} {entry.note}'.strip())}"


def _examples(name: str) -> Iterator[str]:
    yield ".SH EXAMPLES"
    yield "\n.PP\n".join(f"{_roff(what)}:\n.RS 4\n.EX\n{_roff(line)}\n.EE\n.RE" for what, line in EXAMPLES[name])


def _see_also(pages: Iterable[str]) -> Iterator[str]:
    yield ".SH SEE ALSO"
    yield ",\n".join(f"\\fB{_roff(page)}\\fR(1)" for page in pages)


def _roff(text: str) -> str:
    """Return text as roff shows it: a dash as a dash, no command at the start of a line, Unicode by number."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = "".join(letter if letter.isascii() else f"\\[u{ord(letter):04X}]" for letter in text)
    return f"\\&{text}" if text[:1] in (".", "'") else text
