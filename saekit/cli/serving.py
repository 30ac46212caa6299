"""`saekit report --serve`: the report's folder, made where it is missing, and shown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from saekit.cli.output import leave
from saekit.views.page.folder import default_folder, fits, is_report

DEFAULT_PORT = 8642


def serve_report(path: Path, output: Path | None, port: int, asked: dict[str, Any]) -> None:
    """Serve a report until Ctrl-C.

    A process of its own makes the folder, so that this one never holds a model: it is small, and starts at once.

    Args:
        path: What to report on, or a report's folder.
        output: The report's folder; None for the one in the checkpoint's.
        port: 0 for any that is free.
        asked: The options that decide what the report holds, by name.
    """
    from saekit.views.page.serve import serve  # http.server is not for every command's start

    folder = path if is_report(path) else output or default_folder(path)
    if folder != path and not fits(folder, path, asked):
        made = subprocess.run([sys.executable, "-m", "saekit", *sys.argv[1:], "--prepare"], check=False)
        if made.returncode:
            leave(made.returncode)
    serve(folder, port, lambda url: typer.echo(f"Serving the report at {url} (Ctrl-C stops it)"))
    typer.echo("Stopped")
