"""`saekit config`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.cli.options import check_machine, options_given, with_config_options
from saekit.cli.plan import MACHINE
from saekit.errors import UserError
from saekit.runs.layout import RUN_FILE
from saekit.text import command, for_screen


@with_config_options
def config(
    model: Annotated[str | None, typer.Argument(help="Language model: a hub id or a local folder.")] = None,
    dataset: Annotated[str | None, typer.Argument(help="Data set, as in saekit train.")] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", metavar="PATH", help="File to write the run's options to. If it exists, it sets the defaults."
        ),
    ] = Path(RUN_FILE),
    launch_file: Annotated[
        Path,
        typer.Option(
            "--launch-file", metavar="PATH", help="Launch file to write, which says how to start several processes."
        ),
    ] = Path("launch.yaml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask no questions: use the options and defaults.")] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            metavar="N",
            min=1,
            help="Number of processes on this machine; by default one per GPU, or one on a CPU.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", metavar="N", min=1, help="Set up a run on N GPUs of another machine.", rich_help_panel=MACHINE
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory", metavar="SIZE", help="Memory of each of --gpus, such as 80GiB.", rich_help_panel=MACHINE
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    **options: Any,
) -> None:
    """Ask what to train, show what it needs, and write run.yaml and a launch file.

    The options of saekit train set the defaults of the questions. At the end saekit prints the command that starts the
    run.
    """
    from saekit.cli.launch import launch_files
    from saekit.cli.output import EXIT_INTERRUPTED, messages, results

    typed, _ = options_given(None, {"model": model, "dataset": dataset, **options})
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError("saekit config asks questions, but this is no terminal: add --yes, MODEL and DATASET")
    processes = _processes(num_processes, gpus, gpu_memory)
    console = messages()
    try:
        with console.status("Looking at this machine"):
            from saekit import wizard

            targets = wizard.Targets(output, launch_file, launch_files())
            draft = wizard.start(typed, targets, processes)
            wizard.no_bars()  # the libraries' would run through the questions
        if yes and (missing := [name for name in ("model", "dataset") if name not in draft.values]):
            raise UserError(f"{missing[0].upper()} is missing: saekit config --yes MODEL DATASET, or {output} names it")
        asker = wizard.Defaults(console) if yes else wizard.Terminal(console)
        draft = wizard.walk(wizard.QUESTIONS, draft, asker)
    except KeyboardInterrupt:
        console.print("Nothing was written.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    files = wizard.files_of(draft)
    wizard.write_files(files)
    wrote = for_screen(f"Wrote {' and '.join(map(str, files))}. Start the run with", console)
    console.print(wrote, soft_wrap=True, markup=False)
    typer.echo(command(wizard.start_command(draft), results()))


def _processes(num_processes: int | None, gpus: int | None, gpu_memory: str | None) -> str:
    """Return the three options as the answer to the first question."""
    check_machine(gpus, gpu_memory, num_processes)
    return f"{gpus}x{gpu_memory}" if gpus is not None else str(num_processes or "")
