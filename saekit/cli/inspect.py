"""`saekit inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from saekit.cli.options import Plugins
from saekit.config.flat import load_plugins


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
        from saekit.analysis.inspect import inspect_path, inspection_to_json
        from saekit.views.inspection import render_inspection

        inspection = inspect_path(path, layer)
    if other is not None:
        with messages().status(f"Comparing with {other}"):
            from saekit.analysis.compare import compare
            from saekit.views.comparison import comparison_to_json, render_comparison

            comparison = compare(inspection, inspect_path(other, layer))
        if as_json:
            typer.echo(json.dumps(comparison_to_json(comparison), indent=2))
        else:
            render_comparison(comparison, results())
        return
    if as_json:
        typer.echo(json.dumps(inspection_to_json(inspection), indent=2))
    else:
        render_inspection(inspection, results())
