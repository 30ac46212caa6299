"""`saekit report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from saekit.cli.eval import BatchSize, DataSet, IncludeTrainingData, Model, SaePath, Split
from saekit.cli.options import Plugins
from saekit.config.flat import load_plugins


def report(
    path: SaePath,
    dataset: DataSet = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    split: Split = None,
    model: Model = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            min=1,
            help="Tokens to evaluate on and to take contexts from; by default as many as eval.json is of, or 200,000.",
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
    ] = 32_768,
    batch_size: BatchSize = 8,
    include_training_data: IncludeTrainingData = False,
    plugin: Plugins = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")] = False,
) -> None:
    """Make one page of HTML of a checkpoint: training, evaluation, and every latent to browse. It needs no network."""
    from saekit.cli.output import messages
    from saekit.cli.progress import progress

    load_plugins({"plugin": plugin})
    with messages().status("Loading libraries"):
        from saekit.analysis.eval_checkpoint import EvalOptions, joined
        from saekit.views.page.build import build_report

    options = EvalOptions(dataset, split, model, max_tokens, batch_size, include_training_data)
    with joined(quiet=not sys.stderr.isatty()) as placement, progress(shown=placement.rank == 0) as bar:
        size = build_report(path, options, output, placement, latents, bar.status, bar.update)
    typer.echo(f"Wrote {output} ({size / 1e6:.1f} MB): open it in a browser")
