"""`saekit inspect`, `eval` and `report`: what is in a checkpoint, how good it is, and a page of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from saekit.analysis.defaults import DEFAULT_LATENTS, DEFAULT_TOKENS
from saekit.cli.options import Plugins
from saekit.cli.output import messages, progress, results
from saekit.config.flat import load_plugins
from saekit.hub import check_names

SaePath = Annotated[Path, typer.Argument(help="A run, a checkpoint, or one SAE's folder; sparsify's too.")]
DataSet = Annotated[
    str | None, typer.Argument(help="Data to evaluate on; by default what the run left unread of its own data set.")
]
Split = Annotated[str | None, typer.Option("--split", metavar="NAME", help="Of DATASET; as for train.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Language model, where the checkpoint does not say.")
]
OtherModel = Annotated[
    str | None,
    typer.Option(
        "--other-model",
        metavar="NAME",
        help="The second model of crosscoders of two, where the checkpoint does not say.",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="Sequences per forward pass, on each rank.")
]
IncludeTrainingData = Annotated[
    bool,
    typer.Option("--include-training-data", help="Also use what the run was trained on; the result then says so."),
]
Verify = Annotated[
    bool,
    typer.Option(
        " /--no-verify",
        help="Do not compare the SAEs' files with the checkpoint's checksums.",
        show_default=False,
    ),
]


def inspect(
    path: SaePath,
    other: Annotated[
        Path | None, typer.Argument(help="Another one: both are compared, layer by layer.", metavar="[OTHER]")
    ] = None,
    layer: Annotated[
        str | None, typer.Option("--layer", metavar="L", help="One layer, by its number or its hookpoint's name.")
    ] = None,
    verify: Verify = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plugin: Plugins = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")] = False,
) -> None:
    """Show what was learned: per layer FVU, dead latents, firing densities, duplicates, norms. Needs no model."""
    load_plugins({"plugin": plugin})
    with messages().status(f"Reading {path}"):
        from saekit.analysis.inspect import inspect_path, inspection_to_json
        from saekit.views.inspection import render_inspection

        inspection = inspect_path(path, layer, verify=verify)
    if other is not None:
        with messages().status(f"Comparing with {other}"):
            from saekit.analysis.compare import compare
            from saekit.views.comparison import comparison_to_json, render_comparison

            comparison = compare(inspection, inspect_path(other, layer, verify=verify))
        if as_json:
            typer.echo(json.dumps(comparison_to_json(comparison), indent=2))
        else:
            render_comparison(comparison, results())
        return
    if as_json:
        typer.echo(json.dumps(inspection_to_json(inspection), indent=2))
    else:
        render_inspection(inspection, results())


def evaluate(
    path: SaePath,
    dataset: DataSet = None,
    split: Split = None,
    model: Model = None,
    other_model: OtherModel = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens to evaluate on.")
    ] = DEFAULT_TOKENS,
    batch_size: BatchSize = 8,
    include_training_data: IncludeTrainingData = False,
    verify: Verify = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plugin: Plugins = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")] = False,
) -> None:
    """Evaluate SAEs on held-out tokens: reconstruction, and what splicing it into the language model costs."""
    load_plugins({"plugin": plugin})
    check_names(model, dataset)
    check_names(other_model)
    with messages().status("Loading libraries"):
        from saekit.analysis.eval_checkpoint import EvalOptions, evaluate_checkpoint, joined
        from saekit.views.evaluation import render_evaluation

    options = EvalOptions(dataset, split, model, other_model, max_tokens, batch_size, include_training_data, verify)
    with joined(quiet=not sys.stderr.isatty()) as placement:
        with progress(shown=placement.rank == 0) as bar:
            record = evaluate_checkpoint(path, options, placement, bar.status, bar.update).record
        if placement.rank == 0 and as_json:
            typer.echo(json.dumps(record, indent=2))
        elif placement.rank == 0:
            render_evaluation(record, results())


def report(
    path: SaePath,
    dataset: DataSet = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    split: Split = None,
    model: Model = None,
    other_model: OtherModel = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            min=1,
            help="Tokens to evaluate on and to take contexts from; by default as many as eval.json is of, or "
            f"{DEFAULT_TOKENS:,}.",
        ),
    ] = None,
    latents: Annotated[
        int,
        typer.Option(
            "--latents",
            metavar="N",
            min=1,
            help="Latents with contexts on the page, over all layers; of larger dictionaries a sample.",
        ),
    ] = DEFAULT_LATENTS,
    batch_size: BatchSize = 8,
    include_training_data: IncludeTrainingData = False,
    verify: Verify = True,
    plugin: Plugins = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")] = False,
) -> None:
    """Make one page of HTML of a checkpoint: training, evaluation, and every latent to browse. It needs no network."""
    load_plugins({"plugin": plugin})
    check_names(model, dataset)
    check_names(other_model)
    with messages().status("Loading libraries"):
        from saekit.analysis.eval_checkpoint import EvalOptions, joined
        from saekit.views.page.build import build_report

    options = EvalOptions(dataset, split, model, other_model, max_tokens, batch_size, include_training_data, verify)
    with joined(quiet=not sys.stderr.isatty()) as placement, progress(shown=placement.rank == 0) as bar:
        size = build_report(path, options, output, placement, latents, bar.status, bar.update)
    typer.echo(f"Wrote {output} ({size / 1e6:.1f} MB): open it in a browser")
