"""`saekit inspect`, `eval` and `report`: what is in a checkpoint, how good it is, and a page of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from saekit.analysis.defaults import DEFAULT_LATENTS, DEFAULT_TOKENS
from saekit.cli.completion import run_paths
from saekit.cli.options import Plugins
from saekit.cli.output import messages, progress, results
from saekit.cli.serving import DEFAULT_PORT, serve_report
from saekit.config.flat import load_plugins
from saekit.hub import check_names
from saekit.views.page.folder import default_folder

SaePath = Annotated[
    Path,
    typer.Argument(
        autocompletion=run_paths, help="Run, checkpoint, or folder of one SAE; sparsify's folders work, too."
    ),
]
DataSet = Annotated[
    str | None, typer.Argument(help="Data set to evaluate on; by default what the run did not read of its own.")
]
Split = Annotated[str | None, typer.Option("--split", metavar="NAME", help="Split of DATASET, as in saekit train.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Language model, if the checkpoint does not name it.")
]
OtherModel = Annotated[
    str | None,
    typer.Option(
        "--other-model",
        metavar="NAME",
        help="Second model of crosscoders of two models, if the checkpoint does not name it.",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="Sequences per forward pass on each rank.")
]
IncludeTrainingData = Annotated[
    bool,
    typer.Option(
        "--include-training-data", help="Also evaluate on data that the run was trained on. The result says so."
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        " /--no-verify",
        help="Skip the comparison of the SAEs' files with the checkpoint's checksums.",
        show_default=False,
    ),
]


def inspect(
    path: SaePath,
    other: Annotated[
        Path | None,
        typer.Argument(autocompletion=run_paths, help="Compare PATH with this one, layer by layer.", metavar="[OTHER]"),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option("--layer", metavar="L", help="Show one layer in detail, by its number or its hookpoint's name."),
    ] = None,
    verify: Verify = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plugin: Plugins = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show what SAEs have learned, from their files.

    Lists FVU, dead latents, firing densities, duplicates and norms per layer. Needs no language model.
    """
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
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Number of tokens to evaluate on.")
    ] = DEFAULT_TOKENS,
    batch_size: BatchSize = 8,
    include_training_data: IncludeTrainingData = False,
    verify: Verify = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    plugin: Plugins = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Evaluate SAEs on held-out tokens.

    Measures the reconstruction, and what splicing it into the language model costs.
    """
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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File to write the page to (report.html); with --serve or --prepare, the folder of its data.",
        ),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Show the page of a large dictionary from disk, to a browser on this machine."),
    ] = False,
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port for --serve; 0 for any free one.")
    ] = DEFAULT_PORT,
    prepare: Annotated[bool, typer.Option("--prepare", help="Write the folder that --serve reads, and exit.")] = False,
    split: Split = None,
    model: Model = None,
    other_model: OtherModel = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            min=1,
            help="Number of tokens to evaluate on and to take contexts from; by default that of eval.json, or "
            f"{DEFAULT_TOKENS:,}.",
        ),
    ] = None,
    latents: Annotated[
        int | None,
        typer.Option(
            "--latents",
            metavar="N",
            min=1,
            help="Number of latents with contexts on the page, over all layers. Larger dictionaries are sampled. By "
            f"default {DEFAULT_LATENTS:,}, and all of them with --serve or --prepare.",
        ),
    ] = None,
    batch_size: BatchSize = 8,
    include_training_data: IncludeTrainingData = False,
    verify: Verify = True,
    plugin: Plugins = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a page about a checkpoint: training, evaluation, and every latent to browse.

    The page is one HTML file that needs no network. For large dictionaries, --serve shows it from a folder.
    """
    asked = {
        "dataset": dataset,
        "split": split,
        "model": model,
        "other_model": other_model,
        "max_tokens": max_tokens,
        "include_training_data": include_training_data,
        "latents": latents,
    }
    if serve and not prepare:
        serve_report(path, output, port, asked)
        return
    load_plugins({"plugin": plugin})
    check_names(model, dataset)
    check_names(other_model)
    with messages().status("Loading libraries"):
        from saekit.analysis.eval_checkpoint import EvalOptions, joined
        from saekit.views.page.build import build_folder, build_report

    options = EvalOptions(dataset, split, model, other_model, max_tokens, batch_size, include_training_data, verify)
    with joined(quiet=not sys.stderr.isatty()) as placement, progress(shown=placement.rank == 0) as bar:
        if prepare:
            folder = output or default_folder(path)
            size = build_folder(path, options, folder, placement, latents, asked, bar.status, bar.update)
            said = f"Wrote {folder} ({size / 1e6:.1f} MB): show it with saekit report --serve"
        else:
            file = output or Path("report.html")
            size = build_report(path, options, file, placement, latents or DEFAULT_LATENTS, bar.status, bar.update)
            said = f"Wrote {file} ({size / 1e6:.1f} MB): open it in a browser"
    typer.echo(said)
