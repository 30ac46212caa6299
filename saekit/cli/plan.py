"""`saekit plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.cli.options import with_config_options
from saekit.errors import UserError

MACHINE = "Machine"


@with_config_options
def plan(
    model: Annotated[str | None, typer.Argument(help="Language model: a hub id or a local folder.")] = None,
    dataset: Annotated[
        str | None, typer.Argument(help="May be given, so that a train command can be planned; not read.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="PATH", help="YAML file with defaults for all options.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", metavar="N", min=1, help="Plan for N GPUs.", rich_help_panel=MACHINE)
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", metavar="SIZE", help="Memory of each, such as 80GiB.", rich_help_panel=MACHINE),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            metavar="N",
            min=1,
            help="Without --gpus: ranks on this machine; all its GPUs, or one on a CPU.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, in bytes.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something goes wrong.")] = False,
    **options: Any,
) -> None:
    """Say what a run would need in memory and traffic under each placement, from MODEL's config alone."""
    from saekit.cli.output import messages, results
    from saekit.config import RunConfig
    from saekit.config.run import read_yaml

    typed = {
        name: value for name, value in {"model": model, "dataset": dataset, **options}.items() if value is not None
    }
    values = {**(read_yaml(config) if config else {}), **typed}
    if "model" not in values:
        raise UserError("MODEL is missing: saekit plan MODEL, or a --config that names it")
    values.setdefault("dataset", "")  # nothing is read of it
    if (gpus is None) != (gpu_memory is None):
        raise UserError("--gpus and --gpu-memory describe a machine together: give both, or neither for this one")
    if gpus is not None and num_processes is not None:
        raise UserError("--num-processes is for this machine: leave it out with --gpus")
    cfg = RunConfig.from_flat(values)
    with messages().status("Planning"):
        from saekit.planning import describe, detect, make_plan, render, to_json

        machine = detect(num_processes) if gpus is None or gpu_memory is None else describe(gpus, gpu_memory)
        found = make_plan(cfg, machine)
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
    else:
        render(found, results())
