"""Measures whether selecting in low precision costs quality: trains on the demo LM with each `--select-dtype` of a CPU.

    python benchmarks/selection.py

All runs have the same tokens in the same order, the same initial weights, and the language model in float32. The final
FVU is the mean over the last tenth of the steps, per layer. Exits with code 1 if a layer's FVU in low precision is more
than 0.5% above that in fp32.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from common import HERE, OFFLINE, hardware, versions
from rich.console import Console
from rich.table import Table

from saekit.demo import MODEL_DIR, standard_library
from saekit.runs.metrics import read_metrics
from saekit.sae.kernels import SELECT_DTYPES

LIMIT = 1.005
"""The largest ratio of a layer's FVU to that in fp32."""
console = Console()


def main(
    max_tokens: Annotated[int, typer.Option(help="Tokens to train on.")] = 1_000_000,
    out: Annotated[Path, typer.Option(help="File for the results.")] = HERE / "results" / "selection.json",
) -> None:
    """Train with each type and compare the FVUs."""
    with tempfile.TemporaryDirectory(prefix="saekit-selection-") as work:
        folder = Path(work)
        text = folder / "stdlib.jsonl"
        text.write_text("".join(json.dumps({"text": each}) + "\n" for each in standard_library()), encoding="utf-8")
        fvu = {dtype: final_fvu(folder, text, dtype, max_tokens) for dtype in SELECT_DTYPES}
    exact = fvu.pop("fp32")
    ratios = {dtype: {name: each[name] / exact[name] for name in exact} for dtype, each in fvu.items()}
    shown = Table("layer", "fp32's FVU", *(f"{dtype}'s over it" for dtype in ratios))
    for name in exact:
        shown.add_row(name, f"{exact[name]:.5f}", *(f"{each[name]:.4f}" for each in ratios.values()))
    console.print(shown)
    record = {
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(sys.executable),
        "tokens": max_tokens,
        "fvu": {"fp32": exact, **fvu},
        "ratio": ratios,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if max(max(each.values()) for each in ratios.values()) > LIMIT:
        raise typer.Exit(1)


def final_fvu(folder: Path, text: Path, select_dtype: str, max_tokens: int) -> dict[str, float]:
    """Train, and return the mean FVU over the last tenth of the steps, by layer."""
    command = [sys.executable, "-m", "saekit", "train", MODEL_DIR, text, "--ctx-len", 256, "--max-tokens", max_tokens]
    command += ["--lr", 2e-3, "--dtype", "float32", "--select-dtype", select_dtype, "--save-dir", folder]
    command += ["--run-name", select_dtype]
    env = os.environ | OFFLINE | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([str(part) for part in command], env=env, check=True, capture_output=True)
    steps = [each["layers"] for each in read_metrics(folder / select_dtype / "metrics.jsonl")]
    last = steps[-max(1, len(steps) // 10) :]
    return {name: statistics.mean(step[name]["fvu"] for step in last) for name in last[-1]}


if __name__ == "__main__":
    typer.run(main)
