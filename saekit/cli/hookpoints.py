"""`saekit hookpoints`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from saekit.cli.completion import hookpoints as matching
from saekit.hub import check_names


def hookpoints(
    model: Annotated[str, typer.Argument(help="Language model: a hub id or a local folder.")],
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATTERN]",
            autocompletion=matching,
            help="Show what this pattern matches, as in --hookpoints of saekit train.",
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of the model on the hub.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List what can be trained on: MODEL's modules with their widths.

    Reads only the model's configuration.
    """
    from saekit.cli.output import messages, results
    from saekit.config import ModelConfig, TrainConfig

    check_names(model, revision=revision)
    patterns = None if pattern is None else TrainConfig(hookpoints=(pattern,)).hookpoints
    with messages().status(f"Reading the configuration of {model}"):
        from saekit.activations.lm import model_shape, quietly
        from saekit.activations.structure import measure
        from saekit.views.hookpoints import describe, render_matches, render_modules

        shape = model_shape(ModelConfig(model, revision=revision))
        with quietly():
            structure = measure(None, shape.config)
    if as_json:
        typer.echo(json.dumps(describe(model, structure, patterns), indent=2))
    elif patterns is None:
        render_modules(model, structure, results())
    else:
        render_matches(structure, patterns, results())
