"""`saekit doctor` and `saekit demo`: whether it works here, and what it gives."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from saekit.cli.completion import launch_names
from saekit.cli.output import EXIT_FAULT, messages, progress, results, resumable
from saekit.config import TrainConfig
from saekit.demo import MODEL_DIR, standard_library
from saekit.errors import UserError
from saekit.text import command, for_screen

if TYPE_CHECKING:
    from saekit.doctor import Finding

SAVE_DIR = TrainConfig().save_dir
EVALUATED_SHARE = 7
"""Tokens that the demo trains on for each token that it evaluates on."""


def doctor(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON, for a bug report. It contains no token.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Stop at the first check that fails with an error, and show its traceback.")
    ] = False,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            metavar="NAME",
            autocompletion=launch_names,
            help="Start the processes of a launch file, as saekit train does, and check them together.",
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            metavar="N",
            min=1,
            help="Number of processes to start with --launch, instead of the launch file's.",
        ),
    ] = None,
    save_dir: Annotated[
        Path, typer.Option("--save-dir", metavar="PATH", help="Folder that all processes must share.")
    ] = SAVE_DIR,
    limit: Annotated[
        float,
        typer.Option("--limit", metavar="SECONDS", min=1, help="Time that processes wait for each other."),
    ] = 180.0,
) -> None:
    """Check this machine, and say what will not work and how to fix it.

    Checks versions, devices, ranks, 8 bits, the hub and resources. With --launch, or if a launcher starts it on each of
    several machines, it checks the processes together: devices, collectives and their speed, shared folders, clocks,
    versions.
    """
    if launch is not None:
        from saekit.cli.launch import relaunch

        relaunch(context, launch, num_processes)
        return
    if num_processes is not None:
        raise UserError(f"--num-processes {num_processes} needs --launch")
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        _check_together(save_dir, limit, as_json=as_json)
        return
    with messages().status("Looking at this machine"):
        from saekit.doctor import can_train, diagnose, findings_to_json
        from saekit.views.doctor import render_findings

        findings = diagnose(debug=debug)
    if as_json:
        typer.echo(json.dumps(findings_to_json(findings), indent=2))
    else:
        render_findings(findings, results())
    if not can_train(findings):
        raise typer.Exit(EXIT_FAULT)


def _check_together(save_dir: Path, limit: float, *, as_json: bool) -> None:
    """Check the ranks that a launcher has started, of which this is one."""
    from saekit.doctor.launched import Diagnosis

    def tell(findings: list[Finding]) -> None:
        from saekit.doctor import findings_to_json
        from saekit.views.doctor import render_findings

        if as_json:
            typer.echo(json.dumps(findings_to_json(findings), indent=2))
        else:
            render_findings(findings, results(), "These processes can train together.")

    if not Diagnosis(save_dir, limit, tell).run():
        raise typer.Exit(EXIT_FAULT)


def demo(
    save_dir: Annotated[
        Path, typer.Option("--save-dir", metavar="PATH", help="Folder for the demo's text and run.")
    ] = Path("saekit-demo"),
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=2048, help="Number of tokens to train on.")
    ] = 350_000,
    transcode: Annotated[
        bool, typer.Option("--transcode", help="Train transcoders of the model's MLPs instead of SAEs of its layers.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train on the small model that comes with saekit, evaluate, and show the result.

    Takes about two minutes, and needs no network and no GPU: the text is Python's standard library.
    """
    _run_demo(save_dir, max_tokens, transcode=transcode)


def _run_demo(save_dir: Path, max_tokens: int, *, transcode: bool) -> None:
    """Write the standard library's text to a file, train on it, evaluate and show the result, and say what to try next.

    Args:
        save_dir: Holds the text and a numbered run folder, so that nothing of an earlier demo is lost.
        max_tokens: Tokens to train on.
        transcode: Whether to train transcoders of the MLPs.
    """
    with messages().status("Loading libraries"):
        from saekit.analysis.eval_checkpoint import EvalOptions, joined
        from saekit.analysis.inspect import inspect_path
        from saekit.config import RunConfig
        from saekit.training.launch import train_from_config
        from saekit.views.inspection import render_inspection
        from saekit.views.page.build import build_report

    save_dir.mkdir(parents=True, exist_ok=True)
    text = save_dir / "stdlib.jsonl"
    lines = (json.dumps({"text": document}) + "\n" for document in standard_library())
    text.write_text("".join(lines), encoding="utf-8")

    taken = (path.name.removeprefix("run-") for path in save_dir.glob("run-*"))
    number = 1 + max((int(name) for name in taken if name.isdigit()), default=0)
    cfg = RunConfig.from_flat(
        {
            "model": str(MODEL_DIR),
            "dataset": str(text),
            "ctx_len": 256,
            "max_tokens": max_tokens,
            "save_dir": save_dir,
            "run_name": f"run-{number}",
            "transcode": transcode,
        }
    )
    with resumable():
        train_from_config(cfg)
    run_dir = save_dir / f"run-{number}"
    page = run_dir / "report.html"
    with joined(quiet=not sys.stderr.isatty()) as placement, progress() as bar:
        options = EvalOptions(max_tokens=max(1, max_tokens // EVALUATED_SHARE))
        build_report(run_dir, options, page, placement, status=bar.status, progress=bar.update)
    render_inspection(inspect_path(run_dir), results())
    _say_what_is_next(run_dir, page, text, ("--transcode",) if transcode else ())


def _say_what_is_next(run_dir: Path, page: Path, text: Path, kind: tuple[str, ...]) -> None:
    """Print commands to try, each with what it does: behind it if all of them have room there, else below it."""
    commands = {
        ("inspect", str(run_dir), "--layer", "3"): "one layer in detail",
        ("eval", str(run_dir), "--max-tokens", "200000"): "the same numbers on more text that the run has not read",
        ("train", str(MODEL_DIR), str(text), *kind, "--k", "16"): "fewer active latents",
        ("train", "MODEL", "DATASET", *kind): "your own model and text",
        ("train", "--help"): "the options that most runs need",
    }
    console = messages()
    lines = {command(["saekit", *words], console, "  "): what for words, what in commands.items()}
    column = max(map(len, lines)) + 3
    aside = not console.file.isatty() or column + max(map(len, lines.values())) <= console.width
    shown = [f"{line:{column}}{what}" if aside else f"{line}\n      {what}" for line, what in lines.items()]
    opening = for_screen(f"Open {page} in a browser: what each latent fires on.", console)
    console.print(Text("\n".join(["", opening, "", "What to try next:", *shown])), soft_wrap=True)
