"""Measures saekit's trainer on one GPU: tokens per second, and where the host waits for the device in each step.

    python benchmarks/gpu_train.py --width 1024 --layers 8
    python benchmarks/gpu_train.py --cpu --width 64 --layers 2      to test this script; a CPU has no waits

Waits are what `torch.cuda.set_sync_debug_mode("warn")` reports, by the line of saekit that causes them. One run counts
waits. Two others measure rates: with a report after every step, and with a report every 20 steps.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import HERE, hardware, versions
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from train import VOCABULARY, make_model

import saekit
from saekit.report import Reporters

CTX_LEN, BATCH_SIZE = 256, 32
WARM_UP, STEPS = 20, 60
PACKAGE = str(HERE.parent / "saekit")
console = Console()


class Steps(Reporters):
    """Notes the time of every report and, with `count_waits`, counts waits after the warm-up."""

    def __init__(self, count_waits: bool) -> None:
        super().__init__()
        self.ends: list[tuple[int, float]] = []
        self.waits: Counter[str] = Counter()
        self._count = count_waits and torch.cuda.is_available()

    def step(self, stats: Any) -> None:
        """Note the time. At the end of the warm-up, start to count waits."""
        self.ends.append((stats.step, time.perf_counter()))
        if self._count and stats.step == WARM_UP:
            warnings.simplefilter("always")
            warnings.showwarning = self._told
            torch.cuda.set_sync_debug_mode("warn")

    def finish(self) -> None:
        """Stop counting waits."""
        if self._count:
            torch.cuda.set_sync_debug_mode("default")

    def _told(self, message: Any, *_: object, **__: object) -> None:
        if "synchroniz" in str(message):
            ours = [each for each in traceback.extract_stack() if each.filename.startswith(PACKAGE)]
            self.waits[f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno}" if ours else "outside"] += 1


def train(folder: Path, name: str, log_every: int, count_waits: bool = False) -> Steps:
    """Train once and return the reporter."""
    steps = Steps(count_waits)
    sizes = {"ctx_len": CTX_LEN, "batch_size": BATCH_SIZE, "expansion_factor": 8, "k": 32}
    place = {"save_dir": folder, "run_name": name, "save_every": 10**6, "log_every": log_every}
    saekit.train(str(folder / "model"), str(folder / "data"), reporter=steps, **sizes, **place)
    return steps


def rate(steps: Steps) -> float:
    """Return the median of tokens per second between reports after the warm-up."""
    ends = [each for each in steps.ends if each[0] >= WARM_UP]
    seconds = [(b - a) / (end - start) for (start, a), (end, b) in pairwise(ends)]
    return BATCH_SIZE * CTX_LEN / statistics.median(seconds)


def main(
    width: Annotated[int, typer.Option(help="Width of the residual stream.")] = 1024,
    layers: Annotated[int, typer.Option(help="Layers of the language model.")] = 8,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run without a GPU.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Train three times and print rates and waits."""
    found: dict[str, Any] = {"width": width, "layers": layers}
    with tempfile.TemporaryDirectory(prefix="saekit-gpu-") as work:
        folder = Path(work)
        make_model(layers, width, CTX_LEN, folder / "model")
        tokens = torch.randint(3, VOCABULARY, (BATCH_SIZE * STEPS, CTX_LEN))
        Dataset.from_dict({"input_ids": tokens.tolist()}).save_to_disk(folder / "data")
        for every in (1, 20):
            found[f"tokens/s, a report per {every}"] = rate(train(folder, f"every{every}", every))
        waits = train(folder, "waits", 1, count_waits=True).waits
    found["waits per step"] = {place: count / (STEPS - WARM_UP) for place, count in waits.most_common()}
    table = Table("where the host waits", "per step")
    for place, count in found["waits per step"].items():
        table.add_row(place, f"{count:.2f}")
    console.print(table)
    if out is not None:
        record = {"date": date.today().isoformat(), "hardware": hardware(), "versions": versions(sys.executable)}
        record |= ({} if cpu else {"gpu": torch.cuda.get_device_name()}) | found
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rates = ", ".join(f"{name}: {each:,.0f}" for name, each in found.items() if name.startswith("tokens/s"))
    console.print(f"{rates}; waits per step: {sum(found['waits per step'].values()):.1f}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
