"""`saekit report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def report(
    path: Annotated[Path, typer.Argument(help="A run, a checkpoint, or one SAE's folder; sparsify's too.")],
    dataset: Annotated[
        str | None,
        typer.Argument(help="Data to look at; by default what the run left unread of its own data set."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Of DATASET; as for train.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Language model, where the checkpoint does not say.")
    ] = None,
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
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Sequences per forward pass.")
    ] = 8,
    include_training_data: Annotated[
        bool,
        typer.Option("--include-training-data", help="Also use what the run was trained on; the page then says so."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")] = False,
) -> None:
    """Make one page of HTML of a checkpoint: training, evaluation, and every latent to browse. It needs no network."""
    from saekit.cli.output import messages
    from saekit.cli.progress import progress

    with messages().status("Loading libraries"):
        from saekit.evaluation import EvalOptions, joined
        from saekit.page import ReportOptions, build_report

    evaluation = EvalOptions(dataset, split, model, batch_size=batch_size, include_training_data=include_training_data)
    with joined(quiet=not sys.stderr.isatty()) as placement, progress(shown=placement.rank == 0) as bar:
        options = ReportOptions(evaluation, max_tokens, latents)
        size = build_report(path, options, output, placement, bar.status, bar.update)
    typer.echo(f"Wrote {output} ({size / 1e6:.1f} MB): open it in a browser")
