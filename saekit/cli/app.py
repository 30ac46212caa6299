"""The Typer app and its commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from saekit._version import __version__
from saekit.cli.arguments import rewritten
from saekit.cli.cache import cache
from saekit.cli.checkpoints import evaluate, inspect, report
from saekit.cli.config import config
from saekit.cli.first_steps import demo, doctor
from saekit.cli.help import HelpCommand, HelpGroup
from saekit.cli.hookpoints import hookpoints
from saekit.cli.man import man
from saekit.cli.options import with_resume_value
from saekit.cli.output import run
from saekit.cli.plan import plan
from saekit.cli.train import train
from saekit.cli.watch import watch
from saekit.machine import keep_memory

app = typer.Typer(
    name="saekit",
    cls=HelpGroup,
    help="Train sparse autoencoders, transcoders and crosscoders on a language model's activations, all layers at "
    "once.",
    pretty_exceptions_enable=False,
    # `--grad_acc_steps` is as good as `--grad-acc-steps`.
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["--help", "-h"],
    },
)
app.command(cls=HelpCommand)(train)
app.command(cls=HelpCommand)(cache)
app.command("eval", cls=HelpCommand)(evaluate)
for _command in (watch, inspect, report, demo, config, plan, hookpoints, doctor):
    app.command(cls=HelpCommand)(_command)
app.command("man", cls=HelpCommand, hidden=True)(man)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"saekit {__version__}")
        raise typer.Exit


@app.callback()
def _callback(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of `saekit` and `python -m saekit`."""
    keep_memory()
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    sys.argv[1:] = rewritten(with_resume_value(sys.argv[1:]), commands)
    run(app)
