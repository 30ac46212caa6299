"""Held-out quality of saekit's SAEs beside eai-sparsify's, everything else being equal.

    python benchmarks/quality.py                       both models, all settings
    python benchmarks/quality.py --quick               a few tokens, to see that it works

What is compared, and what came out, is in docs/quality.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import typer
from rich.console import Console
from rich.table import Table

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and text are on this machine already

from common import HERE, hardware, peer_python, versions
from quality_bench import OURS, THEIRS, Bench, prepare, subjects

QUICK_TOKENS = 20_480
DEFAULT_GRID = (("adam", "default"), ("adam", "2e-3"), ("signum", "default"))
console = Console()


def main(
    model: Annotated[Literal["demo", "bert", "both"], typer.Option(help="Language model.")] = "both",
    tokens: Annotated[int | None, typer.Option(help="Training tokens; 500,000 (demo), 300,000 (bert).")] = None,
    expansion: Annotated[int | None, typer.Option(help="Latents per dimension; 32 (demo), 8 (bert).")] = None,
    k: Annotated[int, typer.Option(help="Active latents per token.")] = 32,
    optimizer: Annotated[list[str] | None, typer.Option(help="adam or signum; repeatable.")] = None,
    lr: Annotated[list[str] | None, typer.Option(help="A learning rate, or `default`; repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of the initial weights; repeatable.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few tokens and one setting: a check of this script.")] = False,
    peer: Annotated[Path | None, typer.Option("--peer-python", help="A Python that has eai-sparsify.")] = None,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = HERE / "results" / "quality.json",
) -> None:
    """Compare the held-out quality of saekit's and eai-sparsify's SAEs."""
    datasets.disable_progress_bars()
    python = peer_python(peer, console.print)
    grid = DEFAULT_GRID
    if quick or optimizer or lr:
        grid = tuple((name, rate) for name in optimizer or ["adam"] for rate in lr or ["default"])
    origin = {
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": {OURS: versions(sys.executable), THEIRS: versions(python)},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="saekit-quality-") as work:
        benches = []
        for subject in subjects(model):
            wanted = replace(
                subject,
                tokens=QUICK_TOKENS if quick else tokens or subject.tokens,
                expansion=expansion or subject.expansion,
                k=k,
            )
            benches.append(prepare(wanted, Path(work) / wanted.name, python))
        for name, rate in grid:  # the most telling setting first, for every model
            for number in seed or [0]:
                for bench in benches:
                    console.print(table(bench.subject.name, bench.compare(name, rate, number)))
                    write(out, bench, origin)  # each time, so that nothing is lost if the rest is stopped
        for bench in benches:
            report_interop(bench)
    console.print(f"The numbers are in {out.name}.")


def write(out: Path, bench: Bench, origin: dict[str, Any]) -> None:
    """Put what one model's bench has so far into the file, which may hold other models' numbers."""
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    done = {"settings": bench.settings(), "runs": bench.runs, "interop": bench.interop}
    record[bench.subject.name] = {**origin, **done}
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(name: str, run: dict[str, Any]) -> Table:
    """One run's layers, both toolkits side by side."""
    title = f"{name}: {run['optimizer']}, learning rate {run['lr']:.2g}, seed {run['seed']} (held-out tokens)"
    caption = ", ".join(f"{toolkit} {seconds:.0f} s" for toolkit, seconds in run["seconds"].items())
    shown = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    shown.add_column("layer")
    for column in (
        "FVU\nsaekit",
        "FVU\nsparsify",
        "\nratio",
        "dead %\nsaekit",
        "dead %\nsparsify",
        "L0\nsaekit",
        "L0\nsparsify",
    ):
        shown.add_column(column, justify="right")
    for layer, by_run in enumerate(run["layers"].values()):
        a, b = by_run[OURS], by_run[THEIRS]
        numbers = [f"{a['fvu']:.4f}", f"{b['fvu']:.4f}", f"{a['fvu'] / b['fvu']:.4f}"]
        shares = [f"{100 * a['dead']:.2f}", f"{100 * b['dead']:.2f}", f"{a['l0']:.2f}", f"{b['l0']:.2f}"]
        shown.add_row(str(layer), *numbers, *shares)
    return shown


def report_interop(bench: Bench) -> None:
    """Say how far the two toolkits' reconstructions with the same files are apart."""
    for whose, by_hook in bench.interop.items():
        worst = max(by_hook.values())
        console.print(
            f"{bench.subject.name}: {whose}, read by both: at most {worst:.1e} of the RMS apart", soft_wrap=True
        )


if __name__ == "__main__":
    typer.run(main)
