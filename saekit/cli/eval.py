"""`saekit eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from saekit.cli.options import Plugins
from saekit.config.flat import load_plugins

# What is evaluated, and on what: `saekit report` takes the same.
SaePath = Annotated[Path, typer.Argument(help="A run, a checkpoint, or one SAE's folder; sparsify's too.")]
DataSet = Annotated[
    str | None, typer.Argument(help="Data to evaluate on; by default what the run left unread of its own data set.")
]
Split = Annotated[str | None, typer.Option("--split", metavar="NAME", help="Of DATASET; as for train.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Language model, where the checkpoint does not say.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="Sequences per forward pass, on each rank.")
]
IncludeTrainingData = Annotated[
    bool,
    typer.Option("--include-training-data", help="Also use what the run was trained on; the result then says so."),
]


def evaluate(
    path: SaePath,
    dataset: DataSet = None,
    split: Split = None,
    model: Model = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=1, help="Tokens to evaluate on.")] = (
        200_000
    ),
    batch_size: BatchSize = 8,
    include_training_data: IncludeTrainingData = False,
    plugin: Plugins = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")] = False,
) -> None:
    """Evaluate SAEs on held-out tokens: reconstruction, and what grafting it into the language model costs."""
    from saekit.cli.output import messages, results
    from saekit.cli.progress import progress

    load_plugins({"plugin": plugin})
    with messages().status("Loading libraries"):
        from saekit.analysis.eval_checkpoint import EvalOptions, evaluate_checkpoint, joined
        from saekit.views.evaluation import render_evaluation

    options = EvalOptions(dataset, split, model, max_tokens, batch_size, include_training_data)
    with joined(quiet=not sys.stderr.isatty()) as placement:
        with progress(shown=placement.rank == 0) as bar:
            record = evaluate_checkpoint(path, options, placement, bar.status, bar.update).record
        if placement.rank == 0 and as_json:
            typer.echo(json.dumps(record, indent=2))
        elif placement.rank == 0:
            render_evaluation(record, results())
