"""Writes the reference of every command and option, from what `saekit COMMAND --help` is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import typer
from rich.text import Text

from saekit.cli.app import app
from saekit.config.options import options_of
from saekit.config.run import PARTS

HEAD = """\
# Commands and options

`saekit COMMAND --help` shows the same text; both are generated from the code. Options may be spelled with underscores
or dashes. A YAML file for `--config` has the options of `saekit train` with underscores and no leading dashes.
"""
GENERAL = "Options"
CONFIGURED = {option.name: option for part in PARTS for option in options_of(part)}
LIKE_TRAIN = ("config", "plan")
"""Commands that take the options of `saekit train` as well."""


def page() -> str:
    """Return the page, in Markdown."""
    commands = typer.main.get_command(app).commands
    training = {each.name for each in commands["train"].params}
    parts = [HEAD]
    for name, command in commands.items():
        known = training if name in LIKE_TRAIN else set()
        parts.append(f"## saekit {name}\n\n{_help(command)}\n")
        if arguments := [each for each in command.params if each.param_type_name == "argument"]:
            parts.append(_table("argument", ((f"`{each.name.upper()}`", _plain(each.help)) for each in arguments)))
        panels: dict[str, list[Any]] = {}
        for option in command.params:
            if option.param_type_name == "option" and not option.hidden and option.name not in known - {"config"}:
                panels.setdefault(getattr(option, "rich_help_panel", None) or GENERAL, []).append(option)
        for panel, options in panels.items():
            title = f"### {panel}\n\n" if len(panels) > 1 else ""
            parts.append(title + _table("option", map(_row, options)))
        if known:
            parts.append("It also takes the options of [saekit train](#saekit-train).\n")
    return "\n".join(parts)


def _help(command: Any) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (command.help or "").replace("\f", "").split("\n\n"))


def _row(option: Any) -> tuple[str, str]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    kind = "" if option.is_flag else _values(option).replace("|", "&#124;")
    return f"{names}{f' <code>{kind}</code>' if kind else ''}", _plain(option.help)


def _values(option: Any) -> str:
    kind = CONFIGURED[option.name].type if option.name in CONFIGURED else None
    return option.metavar or ("|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else "")


def _plain(marked: str | None) -> str:
    """Help without rich's markup, in a form that a cell of a table can hold."""
    text = Text.from_markup(marked or "").plain
    for sign, escaped in (("|", "&#124;"), ("*", "\\*"), ("<", "&lt;"), ("[", "\\["), ("_", "\\_")):
        text = text.replace(sign, escaped)
    return " ".join(text.split())


def _table(head: str, rows: Iterator[tuple[str, str]]) -> str:
    lines = [f"| {head} | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in rows]
    return "\n".join(lines) + "\n"
