"""Writes the reference of every command and option, from what `saekit COMMAND --help-all` is made of."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from saekit.cli.app import app
from saekit.cli.examples import EXAMPLES
from saekit.cli.reference import ARGUMENTS, Entry, paragraphs, sections, visible_commands

HEAD = """\
# Commands and options

`saekit COMMAND --help` shows what most runs need, and `--help-all` the text of this page; all are generated from the
code. Options may be spelled with underscores or dashes. A YAML file for `--config` has the options of `saekit train`
with underscores and no leading dashes.

`saekit --install-completion` lets the shell (bash, zsh, fish, PowerShell) complete commands, options and many values:
hookpoints of a model in a local folder, launch files, runs, placements, activations. `saekit man FOLDER` writes the man
pages; with `~/.local/share/man/man1` as the folder, `man saekit-train` finds them on most systems.
"""
LIKE_TRAIN = ("config", "plan")
"""Commands that take the options of `saekit train` as well."""


def page() -> str:
    """Return the page, in Markdown."""
    commands = visible_commands(typer.main.get_command(app))
    training = {each.name for each in commands["train"].params if each.param_type_name == "option"}
    parts = [HEAD]
    for name, command in commands.items():
        known = training - {"config"} if name in LIKE_TRAIN else set()
        groups = sections([each for each in command.params if each.name not in known])
        parts.append("\n\n".join([f"## saekit {name}", *map(_plain, paragraphs(command))]) + "\n")
        options = [group for group in groups if group.title != ARGUMENTS]
        parts += [_table("argument", group.entries) for group in groups if group.title == ARGUMENTS]
        for group in options:
            title = f"### {group.title}\n\n" if len(options) > 1 else ""
            parts.append(title + _table("option", group.entries))
        if known:
            parts.append("It also takes the options of [saekit train](#saekit-train).\n")
        lines = [f"# {what}\n{line}" for what, line in EXAMPLES[name]]
        parts.append("```bash\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, in a form that a cell of a table can hold."""
    for sign, escaped in (("|", "&#124;"), ("*", "\\*"), ("<", "&lt;"), ("[", "\\["), ("_", "\\_")):
        text = text.replace(sign, escaped)
    return text


def _table(head: str, entries: Iterable[Entry]) -> str:
    return "\n".join([f"| {head} | meaning |", "|---|---|", *map(_row, entries)]) + "\n"


def _row(entry: Entry) -> str:
    names = ", ".join(f"`{name}`" for name in entry.names)
    value = f" <code>{entry.value.replace('|', '&#124;')}</code>" if entry.value else ""
    return f"| {names}{value} | {_plain(f'{entry.help} {entry.note}'.strip())} |"
