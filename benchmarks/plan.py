"""Compares `saekit plan`'s tokens per second with those of real runs on this machine.

    saekit plan --calibrate
    python benchmarks/plan.py

Language models and tokens are random. Each shape is trained by `saekit train` in its own processes. Its speed is read
from the run's metrics without the first steps. The ratio is measured / planned: above 1 a run is faster than planned.
Nothing else should run on the machine, during this script or during calibration.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from common import HERE, OFFLINE, hardware, versions
from rich.console import Console
from rich.table import Table

from saekit.config import RunConfig
from saekit.planning import detect, make_plan

STEPS, WARM_UP = 12, 4
TOKENIZER = HERE.parent / "saekit" / "demo" / "model"
console = Console()

SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"width": 128, "blocks": 6, "num_latents": 4096, "k": 16, "ctx_len": 128, "batch_size": 16},
    "pythia-70m's": {"width": 512, "blocks": 6, "num_latents": 4096, "k": 32, "ctx_len": 256, "batch_size": 8},
    "expansion 32": {"width": 512, "blocks": 3, "num_latents": 16384, "k": 32, "ctx_len": 256, "batch_size": 8},
    "wide": {"width": 1024, "blocks": 2, "num_latents": 8192, "k": 64, "ctx_len": 128, "batch_size": 8},
    "long sequences": {"width": 512, "blocks": 2, "num_latents": 8192, "k": 32, "ctx_len": 1024, "batch_size": 2},
    "cut up": {
        "width": 512,
        "blocks": 3,
        "num_latents": 8192,
        "k": 32,
        "ctx_len": 256,
        "batch_size": 4,
        "grad_acc_steps": 2,
        "micro_acc_steps": 2,
    },
    "selecting in fp32": {
        "width": 512,
        "blocks": 3,
        "num_latents": 8192,
        "k": 32,
        "ctx_len": 256,
        "batch_size": 8,
        "select_dtype": "fp32",
    },
    "bf16 moments": {
        "width": 768,
        "blocks": 2,
        "num_latents": 24576,
        "k": 32,
        "ctx_len": 256,
        "batch_size": 4,
        "moments_dtype": "bf16",
    },
}
SEVERAL_RANKS = ("pythia-70m's", "expansion 32")


def main(
    quiet_below: Annotated[
        float, typer.Option(help="Before each run, wait until other processes use less than this share of the CPU.")
    ] = 0.1,
    out: Annotated[Path, typer.Option(help="File for the results.")] = HERE / "results" / "plan.json",
) -> None:
    """Compare plans with runs."""
    results = []
    runs = [(name, "single", 1) for name in SHAPES]
    runs += [(name, placement, 2) for name in SEVERAL_RANKS for placement in ("ddp", "layer-map", "zero3")]
    with tempfile.TemporaryDirectory() as folder:
        for name, placement, ranks in runs:
            job = prepared(SHAPES[name], Path(folder) / f"{len(results)}", ranks)
            planned = make_plan(RunConfig.from_flat(job), detect(ranks)).choice(placement).tokens_per_second
            if planned is None:
                raise typer.BadParameter("this machine's rates are not known: run saekit plan --calibrate first")
            wait_for_quiet(quiet_below)
            measured = train(job, placement, ranks)
            ratio = measured / planned
            results.append(
                {"shape": name, "placement": placement, "planned": planned, "measured": measured, "ratio": ratio}
            )
            console.print(f"{name}, {placement}: planned {planned:,.0f}, measured {measured:,.0f}, {ratio:.2f}")
    record = {
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(sys.executable),
        "shapes": SHAPES,
        "results": results,
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print(table(results))


def prepared(shape: dict[str, Any], folder: Path, ranks: int) -> dict[str, Any]:
    """Make a model and tokens for a shape, and return the run's options."""
    from datasets import Dataset, disable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    options = dict(shape)
    width, blocks = options.pop("width"), options.pop("blocks")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=blocks,
            num_attention_heads=max(2, width // 64),
            num_key_value_heads=max(2, width // 64),
            max_position_embeddings=1024,
        )
    )
    model.save_pretrained(folder / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / file).write_bytes((TOKENIZER / file).read_bytes())
    sequences = STEPS * options["batch_size"] * options.get("grad_acc_steps", 1) * ranks
    tokens = torch.randint(5, 2048, (sequences, options["ctx_len"]))
    Dataset.from_dict({"input_ids": tokens.tolist()}).save_to_disk(folder / "data")
    return {
        "model": str(folder / "model"),
        "dataset": str(folder / "data"),
        **options,
        "exclude_special_tokens": False,
        "save_dir": str(folder),
        "run_name": "run",
    }


def train(job: dict[str, Any], placement: str, ranks: int) -> float:
    """Run `saekit train` and return its tokens per second: the median over the steps after the warm-up."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in job.items() if name not in ("model", "dataset")]
    options[options.index("--exclude-special-tokens=False")] = "--no-exclude-special-tokens"
    launch = ["--launch", f"{placement}-cpu", "--num-processes", str(ranks)] if ranks > 1 else []
    command = [sys.executable, "-m", "saekit", "train", job["model"], job["dataset"], *launch, *options]
    done = subprocess.run(command, env=os.environ | OFFLINE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    lines = (Path(job["save_dir"]) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [each["tokens_per_second"] for each in map(json.loads, lines) if "tokens_per_second" in each]
    return statistics.median(rates[WARM_UP:-1])  # the last step does not prepare a next one, so it does less work


def wait_for_quiet(share: float) -> None:
    """Wait until the CPU has been idle for two seconds, but at most for five minutes."""
    for _ in range(60):
        if psutil.cpu_percent(2.0) / 100 < share:
            return
        time.sleep(3)
    console.print("[yellow]Other processes use the CPU: the next measurements will be too slow.")


def table(results: list[dict[str, Any]]) -> Table:
    """Make a table of planned and measured rates, and their ratio."""
    shown = Table(title="tokens per second", title_justify="left")
    for head in ("shape", "placement", "planned", "measured", "measured / planned"):
        shown.add_column(head, justify="left" if head in ("shape", "placement") else "right")
    for each in results:
        numbers = (f"{each['planned']:,.0f}", f"{each['measured']:,.0f}", f"{each['ratio']:.2f}")
        shown.add_row(each["shape"], each["placement"], *numbers)
    return shown


if __name__ == "__main__":
    typer.run(main)
