"""`saekit inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from saekit.cli.options import Plugins
from saekit.config.run import load_plugins


def inspect(
    path: Annotated[Path, typer.Argument(help="A run, a checkpoint, or one SAE's folder; sparsify's too.")],
    other: Annotated[
        Path | None, typer.Argument(help="Another one: both are compared, layer by layer.", metavar="[OTHER]")
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="L", help="One layer, by its number or its hookpoint's name.")
    ] = None,
    plugin: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")] = False,
) -> None:
    """Show what was learned: per layer FVU, dead latents, firing densities, duplicates, norms. Needs no model."""
    from saekit.cli.output import messages, results

    load_plugins({"plugin": plugin})
    with messages().status(f"Reading {path}"):
        from saekit.report.inspect import inspect_path, to_json
        from saekit.report.inspect_view import render

        inspection = inspect_path(path, layer)
    if other is not None:
        with messages().status(f"Comparing with {other}"):
            from saekit.report import compare_view
            from saekit.report.compare import compare

            comparison = compare(inspection, inspect_path(other, layer))
        if as_json:
            typer.echo(json.dumps(compare_view.to_json(comparison), indent=2))
        else:
            compare_view.render(comparison, results())
        return
    if as_json:
        typer.echo(json.dumps(to_json(inspection), indent=2))
    else:
        render(inspection, results())
