"""Measures saving and loading a checkpoint, compared with writing and reading the same bytes with safetensors alone.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --dir /mnt/scratch --layers 8

The bank is that of a real run: SAEs and their Adam moments after two optimizer steps on a random language model. Each
round runs these one after the other: `save_file` of every layer's tensors, with and without waiting for the disk;
saekit's save, which waits for the disk, computes checksums, writes the index and deletes the previous checkpoint;
`load_file` of the same files; and finding, checking and restoring saekit's checkpoint. Peak memory is the growth of the
process's resident set. Exits with code 1 if saving costs more than 1.3 × writing and flushing the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import HERE, hardware, versions
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from saekit import SaeConfig, SaeTrainer, TrainConfig
from saekit.report import Reporters
from saekit.runs.recovery import find_checkpoint
from saekit.training import state, trainer
from saekit.training.saving import Saver

LIMIT = 1.3
"""The largest ratio of the time of a save to that of writing the same bytes."""
CTX_LEN = 64
console = Console()


def main(
    layers: Annotated[int, typer.Option(help="SAEs in the bank.", min=1)] = 4,
    width: Annotated[int, typer.Option(help="Model width.")] = 512,
    latents: Annotated[int, typer.Option(help="Latents per SAE.")] = 16384,
    rounds: Annotated[int, typer.Option(help="Rounds of measurements; the result is their median.", min=1)] = 9,
    dir: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; by default the one for temporary files.")
    ] = None,
    out: Annotated[Path, typer.Option(help="File for the results.")] = HERE / "results" / "checkpoint.json",
) -> None:
    """Measure saving and loading."""
    with tempfile.TemporaryDirectory(prefix="saekit-checkpoint-", dir=dir) as work:
        folder = Path(work)
        saver = a_run(layers, width, latents, folder)
        files = {
            file.relative_to(saver.run.checkpoint): load_copy(file)
            for file in sorted(saver.run.checkpoint.rglob("*.safetensors"))
        }
        gigabytes = sum(t.nbytes for tensors in files.values() for t in tensors.values()) / 1e9
        console.print(f"{layers} SAEs of {latents:,} latents for width {width}: {gigabytes:.2f} GB with Adam's moments")
        measured: dict[str, list[dict[str, float]]] = {}
        for number in range(rounds + 1):
            done = one_round(saver, files, folder)
            for name, each in done.items() if number else ():  # the first round is a warm-up
                measured.setdefault(name, []).append(each)
    result = {
        name: {
            "seconds_per_gb": statistics.median(each["seconds"] for each in values) / gigabytes,
            "peak_mb": statistics.median(each["peak"] for each in values) / 1e6,
        }
        for name, values in measured.items()
    }
    ratios = [
        ours["seconds"] / theirs["seconds"]
        for ours, theirs in zip(measured["save"], measured["save_file, flushed"], strict=True)
    ]
    ratio = statistics.median(ratios)
    largest_layer = sum(t.nbytes for name, each in files.items() if name.parts[0] == "layers.0" for t in each.values())
    console.print(table(result, largest_layer))
    console.print(f"Saving costs {ratio:.2f} × (from {min(ratios):.2f} to {max(ratios):.2f}) the same bytes, flushed.")
    record = {
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(sys.executable),
        "bank": {"layers": layers, "d_in": width, "num_latents": latents, "gigabytes": gigabytes},
        "rounds": rounds,
        "medians": result,
        "save_over_save_file": {"median": ratio, "min": min(ratios), "max": max(ratios)},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if ratio > LIMIT:
        raise typer.Exit(1)


def a_run(layers: int, width: int, latents: int, folder: Path) -> Saver:
    """Train for two steps and return the run's `Saver`."""
    made: list[Saver] = []
    trainer.Saver = lambda *args: made.append(Saver(*args)) or made[0]  # type: ignore[assignment,func-returns-value]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=4
    )
    data = Dataset.from_dict({"input_ids": torch.randint(5, 256, (8, CTX_LEN)).tolist()})
    cfg = TrainConfig(SaeConfig(num_latents=latents), batch_size=4, save_dir=folder, run_name="run", keep_last=1)
    SaeTrainer(cfg, data, LlamaForCausalLM(config).eval(), reporter=Reporters()).fit()
    return made[0]


def one_round(saver: Saver, files: dict[Path, dict[str, torch.Tensor]], folder: Path) -> dict[str, dict[str, float]]:
    """Measure everything once: return seconds and peak bytes by name."""
    plain = folder / "plain"

    def write(flush: bool) -> None:
        shutil.rmtree(plain, ignore_errors=True)  # a save also deletes the previous checkpoint
        for name, tensors in files.items():
            (plain / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, plain / name)
            if flush:
                flush_file(plain / name)

    def restore() -> None:
        found = find_checkpoint(saver.plan.run_dir)
        state.restore(found.folder, found.index, saver.run, saver.bank)

    results = {
        "save_file": measure(lambda: write(flush=False)),
        "save_file, flushed": measure(lambda: write(flush=True)),
        "save": measure(saver.save),
        "load_file": measure(lambda: [load_copy(plain / name) for name in files]),
        "find and check": measure(lambda: find_checkpoint(saver.plan.run_dir)),
        "find, check and restore": measure(restore),
    }
    return results


def measure(work: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds of some work, and the largest growth of the resident set in bytes."""
    os.sync()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = resident("VmRSS")
    start = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - start
    del kept
    return {"seconds": seconds, "peak": resident("VmHWM") - before}


def resident(field: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def load_copy(file: Path) -> dict[str, torch.Tensor]:
    """Load a file's tensors and copy them, so that they are not mapped from the file."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def flush_file(file: Path) -> None:
    """Wait until a file is on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def table(result: dict[str, dict[str, float]], largest_layer: int) -> Table:
    """Make a table of the medians."""
    shown = Table("", caption=f"one layer: {largest_layer / 1e6:.0f} MB", title_justify="left")
    for column in ("s per GB", "peak MB"):
        shown.add_column(column, justify="right")
    for name, each in result.items():
        shown.add_row(name, f"{each['seconds_per_gb']:.3f}", f"{each['peak_mb']:.0f}")
    return shown


if __name__ == "__main__":
    typer.run(main)
