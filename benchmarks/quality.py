"""Compares held-out quality: saekit with its defaults, the peers with their defaults and sweeps, all else equal.

    python benchmarks/quality.py                            both models, 1M tokens, all recipes, one seed
    python benchmarks/quality.py --tokens 1M --tokens 10M --seed 0 --seed 1
    python benchmarks/quality.py --only saekit --again      repeats saekit's runs and keeps the peers'
    python benchmarks/quality.py --kind transcoder          transcoders of all MLPs, compared with sparsify's
    python benchmarks/quality.py --kind crosscoder          of all layers, compared with a fork of dictionary-learning
    python benchmarks/quality.py --quick                    few tokens, to test this script

Results are written after every run, and runs that are already in the file are not repeated. Stopping the script
therefore loses one run at most. docs/quality.md describes the comparison and its results.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import typer
from rich.console import Console
from rich.table import Table

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and text are already on this machine

from common import HERE, hardware, versions
from quality_bench import Bench, prepare, python_of, subjects
from recipes import DICTIONARY_LEARNING, FORK, SPARSIFY

QUICK_TOKENS = 20_480
FORMAT = 2
console = Console()


def main(
    model: Annotated[Literal["demo", "bert", "both"], typer.Option(help="Language model.")] = "both",
    tokens: Annotated[list[str] | None, typer.Option(help="Tokens to train on, such as 1M; repeatable.")] = None,
    kind: Annotated[
        Literal["sae", "transcoder", "crosscoder"],
        typer.Option(help="SAEs of blocks' outputs, transcoders of MLPs, or a crosscoder of all blocks' outputs."),
    ] = "sae",
    layers: Annotated[str | None, typer.Option(help="Layers such as 0,2,5; all by default.")] = None,
    expansion: Annotated[int | None, typer.Option(help="Latents per dimension; 32 (demo), 8 (bert).")] = None,
    k: Annotated[int, typer.Option(help="Active latents per token.")] = 32,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of the initial weights; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Recipes whose labels start with this; repeatable.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Repeat runs that are already in the file.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few tokens and latents, to test this script.")] = False,
    sparsify_python: Annotated[Path | None, typer.Option(help="Python of an environment with eai-sparsify.")] = None,
    dictionary_learning_python: Annotated[
        Path | None, typer.Option(help="Python of an environment with dictionary-learning.")
    ] = None,
    fork_python: Annotated[
        Path | None, typer.Option(help="Python of an environment with dictionary-learning's fork for crosscoders.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Compare the held-out quality of the SAEs of saekit and its peers."""
    datasets.disable_progress_bars()
    given = {SPARSIFY: sparsify_python, DICTIONARY_LEARNING: dictionary_learning_python, FORK: fork_python}
    pythons = {name: python for name, python in given.items() if python is not None}
    budgets = [QUICK_TOKENS] if quick else [count(each) for each in tokens or ["1M"]]
    out = out or HERE / "results" / ("quality.json" if kind == "sae" else f"quality_{kind}s.json")
    runs = read(out)
    for subject in subjects(model):
        wanted = replace(
            subject,
            expansion=2 if quick else expansion or subject.expansion,
            k=k,
            transcode=kind == "transcoder",
            crosscode=kind == "crosscoder",
            layers=tuple(map(int, layers.split(","))) if layers else None,
        )
        for budget in budgets:
            with tempfile.TemporaryDirectory(prefix="saekit-quality-") as work:
                bench = prepare(wanted, budget, Path(work))
                for number in seed or [0]:
                    compare(bench, number, only, again, pythons, runs, out)
                console.print(table(bench.about(), runs))


def compare(
    bench: Bench,
    seed: int,
    only: list[str] | None,
    again: bool,
    pythons: dict[str, Path],
    runs: list[dict[str, Any]],
    out: Path,
) -> None:
    """Make the missing runs one by one, and write each result at once."""
    for recipe in bench.recipes():
        if only and not any(recipe.label.startswith(start) for start in only):
            continue
        about = {**bench.about(), "recipe": recipe.label, "settings": recipe.settings, "seed": seed}
        known = [run for run in runs if about.items() <= run.items()]
        if known and not again:
            continue
        python = python_of(recipe.toolkit, pythons, console.print)
        found = bench.run(recipe, python, seed)
        for run in known:
            runs.remove(run)
        runs.append(
            {**about, **found, "date": date.today().isoformat(), "hardware": hardware(), "versions": versions(python)}
        )
        write(out, runs)
        means = summary([runs[-1]])
        shown = ", ".join(f"{name} {value:.4f}" for name, value in means.items() if value is not None)
        console.print(f"{recipe.label}, seed {seed}: {shown} ({found['seconds']:.0f} s)", soft_wrap=True)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the runs so far."""
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return record["runs"] if record.get("format") == FORMAT else []


def write(file: Path, runs: list[dict[str, Any]]) -> None:
    """Write all runs at once, so that stopping the script leaves a whole file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps({"format": FORMAT, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def summary(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return means over layers and runs."""
    layers = [layer for run in runs for layer in run["layers"].values()]
    found: dict[str, float | None] = {}
    for name in ("fvu", "dead", "ce_recovered", "kl"):
        values = [layer[name] for layer in layers if layer[name] is not None]
        found[name] = statistics.fmean(values) if values else None
    return found


def table(about: dict[str, Any], runs: list[dict[str, Any]]) -> Table:
    """Make a table of all recipes for one model and budget.

    It has means over layers and seeds, half of the FVU's range over seeds, and the FVU of the worst layer.
    """
    title = f"{about['model']}, {about['tokens']:,} tokens, {about['num_latents']:,} latents, k {about['k']}"
    shown = Table("recipe", title=title, title_justify="left")
    for column in ("seeds", "FVU", "±", "worst", "dead %", "CE rec.", "KL"):
        shown.add_column(column, justify="right")
    here = [run for run in runs if about.items() <= run.items()]
    for label in dict.fromkeys(run["recipe"] for run in here):
        own = [run for run in here if run["recipe"] == label]
        mean = summary(own)
        each = [summary([run])["fvu"] for run in own]
        worst = max(layer["fvu"] for run in own for layer in run["layers"].values())
        spread = f"{(max(each) - min(each)) / 2:.4f}" if len(own) > 1 else ""
        answers = ["" if mean[name] is None else f"{mean[name]:.4f}" for name in ("ce_recovered", "kl")]
        row = (label, str(len(own)), f"{mean['fvu']:.4f}", spread, f"{worst:.4f}", f"{100 * mean['dead']:.2f}")
        shown.add_row(*row, *answers)
    return shown


def count(text: str) -> int:
    """Parse a number of tokens, such as `10M` for 10,000,000."""
    units = {"k": 1000, "M": 10**6}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1] in units else int(text)


if __name__ == "__main__":
    typer.run(main)
