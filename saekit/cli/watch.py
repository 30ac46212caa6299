"""`saekit watch`: the live view of a run that another process trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from saekit.cli import completion
from saekit.config import TrainConfig

SAVE_DIR = TrainConfig().save_dir
LOOKS = 1.0
"""Seconds between two looks at the run's files."""


def watch(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="A run's folder, or its name in --save-dir; by default the newest run there.",
            autocompletion=completion.run_names,
        ),
    ] = None,
    save_dir: Annotated[
        Path, typer.Option("--save-dir", metavar="PATH", help="Folder that holds the runs.")
    ] = SAVE_DIR,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show the live view of a run that another process trains, also on another machine that shares the folder.

    It only reads the run's files. Ctrl-C leaves it, and the run goes on.
    """
    from saekit.cli.output import messages, results
    from saekit.runs.watch import find_run, watching

    watched = watching(find_run(run, save_dir), results())
    try:
        while not watched.look():
            time.sleep(LOOKS)
    except KeyboardInterrupt:
        messages().print(watched.leave(), soft_wrap=True, markup=False, highlight=False)
    except BaseException:
        watched.leave()
        raise
