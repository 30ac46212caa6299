"""`saekit demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    save_dir: Annotated[
        Path, typer.Option("--save-dir", metavar="PATH", help="Folder for the demo's text and run.")
    ] = Path("saekit-demo"),
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=2048, help="Tokens to train on.")
    ] = 350_000,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")] = False,
) -> None:
    """Train on all layers of the small model that comes with saekit, evaluate that, and look at it; about two minutes.

    Needs no network and no GPU: the text is read from the standard library of this very Python.
    """
    from saekit.cli.output import messages

    with messages().status("Loading libraries"):
        from saekit.cli.first_steps import run_demo
    run_demo(save_dir, max_tokens)
