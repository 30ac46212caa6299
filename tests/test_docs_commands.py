"""Commands in the documents are commands that there are, with options that these have."""

import re
from pathlib import Path

import pytest
import typer

from saekit.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for pattern in ("*.md", "docs/*.md") for path in ROOT.glob(pattern) if path.name != "CHANGELOG.md")
COMMANDS = typer.main.get_command(app).commands
SHOWN = re.compile(r"(^|^ {4}(?:\$ )?|`|-m |srun \.\.\. )saekit ([a-z]+)([^\n`]*)", re.MULTILINE)
"""What stands before a command (nothing: in a fenced block, but prose also begins so), the command, and the rest."""
OPTION = re.compile(r"--[a-z0-9][a-z0-9_-]*")


def wrong(text):
    for before, command, rest in SHOWN.findall(text):
        if command not in COMMANDS:
            if before:
                yield f"saekit {command}"
            continue
        names = {name for option in COMMANDS[command].params for name in (*option.opts, *option.secondary_opts)}
        for option in OPTION.findall(rest):
            if option.replace("_", "-") not in {*names, "--help"}:
                yield f"saekit {command} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_are_there(page):
    assert list(wrong(page.read_text(encoding="utf-8"))) == []


def test_a_wrong_command_is_found():
    text = "    saekit train M D --k 3 --kk 3\n    $ saekit plan M --gpus 2 --no-such\n\nand `saekit nothing` here\n"
    text += "    accelerate launch -m saekit train M D --reesume\n\nsaekit trains what it likes --freely\n"
    assert [each.split()[-1] for each in wrong(text)] == ["--kk", "--no-such", "nothing", "--reesume"]
