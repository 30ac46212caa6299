"""`saekit plan`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.cli.completion import launch_names
from saekit.cli.options import check_machine, options_given, require, with_config_options
from saekit.errors import UserError
from saekit.hub import check_names

MACHINE = "Machine"


@with_config_options
def plan(
    model: Annotated[str | None, typer.Argument(help="Language model: a hub id or a local folder.")] = None,
    dataset: Annotated[
        str | None, typer.Argument(help="Accepted so that you can plan a train command as it is; not read.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="PATH", help="Read options from a YAML file; the command line overrides it."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="N", min=1, help="Plan for N GPUs of another machine.", rich_help_panel=MACHINE),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory", metavar="SIZE", help="Memory of each of --gpus, such as 80GiB.", rich_help_panel=MACHINE
        ),
    ] = None,
    use_this: Annotated[
        bool,
        typer.Option(
            "--detect",
            help="Plan for this machine, its GPUs or its CPU; the default without --gpus.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            metavar="N",
            min=1,
            help="Number of ranks on this machine, without --gpus; by default one per GPU, or one on a CPU.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            metavar="NAME",
            autocompletion=launch_names,
            help="Plan for a launch file, as in saekit train. It sets the placement, what is offloaded and, without "
            "--gpus, the number of ranks.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure this machine's speed first, and keep it: later plans then say tokens per second. This takes "
            "half a minute, in which the machine should do nothing else. MODEL may be left out.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, with sizes in bytes.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    **options: Any,
) -> None:
    """Estimate the memory, traffic and time of a run under each placement.

    Reads only MODEL's configuration. Takes the options of saekit train, which describe the run.
    """
    from saekit.cli.output import messages, results
    from saekit.config import RunConfig

    _, values = options_given(config, {"model": model, "dataset": dataset, **options})
    if "activations" in values:
        from saekit.training.cached import completed

        values = completed(values)
    if not measure:
        require(values, ("model",), "saekit plan MODEL")
    values.setdefault("dataset", "")  # nothing is read of it
    _check_machine(gpus, gpu_memory, num_processes, use_this=use_this, measure=measure)
    cfg = RunConfig.from_flat(values) if "model" in values else None
    if cfg is not None and cfg.train.activations is None:
        for named in (cfg.model, cfg.other_model):
            if named is not None:
                check_names(named.model, revision=named.revision)
    with messages().status("Loading libraries") as status:
        from saekit.planning import NO_OFFLOAD, advise, describe, detect, make_plan, measure_rates
        from saekit.views.plan import plan_to_json, render_plan, render_rates

        ranks, offload, asked = num_processes, NO_OFFLOAD, None
        if launch is not None:
            from saekit.cli.launch import offload_of, placement_of, processes_of

            ranks, offload = (processes_of(launch, num_processes) if gpus is None else None), offload_of(launch)
            asked = placement_of(launch, str(values.get("placement", "auto")))
        machine = detect(ranks) if gpus is None or gpu_memory is None else describe(gpus, gpu_memory)
        if measure:
            measured = measure_rates(machine, lambda text: status.update(text))
            machine = detect(ranks)
        if cfg is not None:
            status.update("Planning")
            plan = make_plan(cfg, machine, offload=offload, asked=asked)
            advice = advise(plan)
    if as_json:
        rates = {"rates": {name: dataclasses.asdict(each) for name, each in measured.found.items()}} if measure else {}
        typer.echo(json.dumps({**rates, **(plan_to_json(plan, advice) if cfg is not None else {})}, indent=2))
        return
    if measure:
        render_rates(measured, results())
    if cfg is not None:
        render_plan(plan, results(), advice)


def _check_machine(
    gpus: int | None, gpu_memory: str | None, num_processes: int | None, *, use_this: bool, measure: bool
) -> None:
    """Check that one machine is meant, not two."""
    if use_this and gpus is not None:
        raise UserError(f"--detect plans for this machine and --gpus {gpus} for another: give one of them")
    if measure and gpus is not None:
        raise UserError(f"--calibrate measures this machine, and --gpus {gpus} describes another: give one of them")
    check_machine(gpus, gpu_memory, num_processes)
