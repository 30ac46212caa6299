"""`saekit train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saekit.cli.completion import launch_names
from saekit.cli.options import options_given, require, with_config_options
from saekit.config import ranks
from saekit.config.schema import PLACEMENT
from saekit.errors import UserError
from saekit.hub import check_names
from saekit.registry import SOURCES
from saekit.runs.folder import all_options

if TYPE_CHECKING:
    from saekit.config import RunConfig


@with_config_options
def train(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Language model: a hub id or a local folder.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Argument(
            metavar="DATASET",
            help="Data set: a hub id, a file, a folder or a glob. Files are .jsonl, .parquet, .csv, .txt or .md, also "
            "compressed as .gz or .zst; folders may come from save_to_disk. Token ids are read from a column input_ids "
            "or a .bin file.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="PATH",
            help="Read options from a YAML file; the command line overrides it. It may name MODEL and DATASET, too.",
        ),
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            metavar="NAME",
            autocompletion=launch_names,
            help="Start several processes with a launch file, such as ddp, zero3, layer-map or ddp-cpu. NAME is a file "
            "in accelerate_configs, or the path of your own.",
            rich_help_panel=PLACEMENT,
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            metavar="N",
            min=1,
            help="Number of processes to start with --launch, instead of the launch file's.",
            rich_help_panel=PLACEMENT,
        ),
    ] = None,
    distribute_layers: Annotated[
        bool,
        typer.Option("--distribute-layers", help="Short for --placement layer-map.", rich_help_panel=PLACEMENT),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and the memory that it needs, and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    **options: Any,
) -> None:
    """Train SAEs, transcoders or crosscoders on MODEL's activations on DATASET.

    By default there is one SAE per layer of the residual stream, and all are trained at once. --hookpoints chooses
    other modules, --transcode trains transcoders, --crosscode one crosscoder, and --crosscode-models crosscoders of two
    models.
    """
    from saekit.cli.output import messages, resumable, say_next
    from saekit.config import RunConfig

    typed, _ = options_given(None, {"model": model, "dataset": dataset, **options})
    if distribute_layers:
        ranks.distribute_layers(typed)
    values = _of_cache(all_options(typed, config))
    require(values, ("model", "dataset"), "saekit train MODEL DATASET")
    cfg = RunConfig.from_flat(values)
    _check_names(cfg)
    if dry_run:
        return _show(cfg, launch, num_processes)
    if launch is not None:
        from saekit.cli.launch import relaunch

        return relaunch(context, launch, num_processes)
    if num_processes is not None:
        raise UserError(f"--num-processes {num_processes} needs --launch")
    with messages().status("Loading libraries"):
        from saekit.training.launch import train_from_config
    with resumable():
        last = train_from_config(cfg)
    say_next(last.parent)


def _of_cache(values: dict[str, Any]) -> dict[str, Any]:
    """Add what the cache of `--activations` says of model and data set."""
    if values.get("activations") is None:
        return values
    from saekit.training.cached import completed

    return completed(values)


def _check_names(cfg: RunConfig) -> None:
    """Refuse names that lead nowhere at once: loading the libraries takes seconds."""
    if cfg.train.activations is not None:  # it was made with these names, and is read instead
        return
    if SOURCES.origin(cfg.train.source) is not None:  # a plug-in's may understand others
        return
    check_names(cfg.model.model, cfg.data.dataset, cfg.data.eval_dataset, revision=cfg.model.revision)
    if cfg.other_model is not None:
        check_names(cfg.other_model.model, revision=cfg.other_model.revision)


def _show(cfg: RunConfig, launch: str | None, num_processes: int | None) -> None:
    """Print the configuration as YAML, with every default, and the plan of the run's placement on this machine."""
    from saekit.cli.output import messages, results
    from saekit.config.flat import as_yaml

    if launch is None and num_processes is not None:
        raise UserError(f"--num-processes {num_processes} needs --launch")
    with messages().status("Planning"):
        from saekit.planning import NO_OFFLOAD, advise, detect, make_plan
        from saekit.views.plan import render_plan

        ranks, asked, offload = int(os.environ.get("WORLD_SIZE", "1")), None, NO_OFFLOAD
        if launch is not None:
            from saekit.cli.launch import offload_of, placement_of, processes_of

            ranks, offload = processes_of(launch, num_processes), offload_of(launch)
            asked = placement_of(launch, cfg.train.placement)
        plan = make_plan(cfg, detect(ranks), offload=offload, asked=asked)
        advice = advise(plan)
    typer.echo(as_yaml(cfg.to_flat()))
    render_plan(plan, results(), advice)
