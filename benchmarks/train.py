"""Compares whole trainers on all layers at once: `saekit train` and eai-sparsify's Trainer.

    python benchmarks/train.py
    python benchmarks/train.py --gpu --width 2048 --layers 16

The language model is a GPT-NeoX of pythia-70m's shape, with random weights and random tokens, which do not change the
speed, and one SAE per layer. Each repetition runs every contestant once, one after the other. Rates are medians over
the steps after a warm-up, from the end of one step to the end of the next. They therefore include everything: data,
language model, routing, SAEs, statistics, reports. Contestants:

- saekit: `saekit train MODEL DATA` with no options but sizes.
- saekit fp32: with the language model and the selection in float32.
- sparsify: its Trainer with the model in float32, the type in which it loads such a model.
- sparsify bf16 LM: the same with the language model in bfloat16.

Exits with code 1 if saekit is less than `--at-least` times as fast as sparsify.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import HERE, OFFLINE, hardware, json_from, peer_python, spread, versions
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saekit.runs.metrics import read_metrics

VOCABULARY = 50304
console = Console()


def main(
    layers: Annotated[int, typer.Option(help="Layers of the language model.")] = 6,
    width: Annotated[int, typer.Option(help="Width of the residual stream.")] = 512,
    expansion: Annotated[int, typer.Option(help="Latents per dimension.")] = 8,
    k: Annotated[int, typer.Option(help="Active latents per token.")] = 32,
    ctx_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    steps: Annotated[int, typer.Option(help="Timed steps per run.", min=1)] = 12,
    warm_up: Annotated[int, typer.Option(help="Steps before the timed ones.", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="Runs per contestant.", min=1)] = 5,
    gpu: Annotated[bool, typer.Option(help="Run on the CUDA device.")] = False,
    at_least: Annotated[float, typer.Option(help="Smallest ratio to sparsify's tokens/s.")] = 3.0,
    peer: Annotated[Path | None, typer.Option(help="Python of an environment with eai-sparsify.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Measure trainers."""
    python = peer_python(peer, console.print)
    with tempfile.TemporaryDirectory(prefix="saekit-train-") as work:
        folder = Path(work)
        make_model(layers, width, ctx_len, folder / "model")
        tokens = torch.randint(3, VOCABULARY, (batch_size * (warm_up + steps + 1), ctx_len))
        Dataset.from_dict({"input_ids": tokens.tolist()}).save_to_disk(folder / "data")
        job = {
            "model": str(folder / "model"),
            "data": str(folder / "data"),
            "out": str(folder / "peer"),
            "expansion": expansion,
            "k": k,
            "batch_size": batch_size,
            "ctx_len": ctx_len,
            "warm_up": warm_up,
            "tokens_per_step": batch_size * ctx_len,
            "device": "cuda" if gpu else "cpu",
        }
        runs: dict[str, list[dict[str, Any]]] = {}
        for number in range(repeats):
            exact = ("--dtype", "float32", "--select-dtype", "fp32")
            runs.setdefault("saekit", []).append(ours(job, folder / f"ours-{number}", ()))
            runs.setdefault("sparsify", []).append(theirs(python, job, folder, "float32"))
            runs.setdefault("saekit fp32", []).append(ours(job, folder / f"exact-{number}", exact))
            runs.setdefault("sparsify bf16 LM", []).append(theirs(python, job, folder, "bfloat16"))
    contestants = {
        name: {
            "tokens_per_second": spread([each["tokens_per_second"] for each in own]),
            "peak_mb": spread([each["peak_bytes"] / 1e6 for each in own]),
            **{
                f"times_{peer_name}": spread(
                    [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(own, runs[peer_name], strict=True)]
                )
                for peer_name in ("sparsify", "sparsify bf16 LM")
            },
        }
        for name, own in runs.items()
    }
    console.print(table(contestants))
    record = {
        "date": date.today().isoformat(),
        "hardware": hardware() | ({"gpu": torch.cuda.get_device_name()} if gpu else {}),
        "versions": {"ours": versions(sys.executable), "peer": versions(python)},
        "sizes": {"layers": layers, "width": width, "expansion": expansion, "k": k, "ctx_len": ctx_len}
        | {"batch_size": batch_size, "steps": steps, "repeats": repeats},
        "contestants": contestants,
    }
    out = out or HERE / "results" / ("train_gpu.json" if gpu else "train.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if contestants["saekit"]["times_sparsify"]["median"] < at_least:
        raise typer.Exit(1)


def make_model(layers: int, width: int, ctx_len: int, folder: Path) -> None:
    """Save a language model with random weights and without a tokenizer."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=max(2048, ctx_len),
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)


def ours(job: dict[str, Any], out: Path, more: tuple[str, ...]) -> dict[str, Any]:
    """Run `saekit train` and return its rate and memory. A step is reported after the GPU has finished its work."""
    command = [sys.executable, "-m", "saekit", "train", job["model"], job["data"], *more]
    command += ["--expansion-factor", str(job["expansion"]), "--k", str(job["k"])]
    command += [
        "--ctx-len",
        str(job["ctx_len"]),
        "--batch-size",
        str(job["batch_size"]),
        "--save-dir",
        str(out.parent),
        "--run-name",
        out.name,
    ]
    env = os.environ | OFFLINE | ({} if job["device"] == "cuda" else {"CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"saekit train ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    lines = read_metrics(out / "metrics.jsonl")
    timed = [(before, line) for before, line in itertools.pairwise(lines) if line["step"] > job["warm_up"] + 1]
    rates = [(line["tokens"] - before["tokens"]) / (line["time"] - before["time"]) for before, line in timed]
    return {
        "tokens_per_second": statistics.median(rates),
        "peak_bytes": max(line["memory_bytes"] for _, line in timed),
    }


def theirs(python: Path, job: dict[str, Any], folder: Path, lm_dtype: str) -> dict[str, Any]:
    """Run sparsify's Trainer and return its rate and memory."""
    return json_from(python, "peers/sparsify_rate.py", job | {"lm_dtype": lm_dtype}, folder)


def table(contestants: dict[str, Any]) -> Table:
    """Make a table of ratios: median (minimum to maximum)."""
    shown = Table("", title="Whole trainer", title_justify="left")
    for column in ("tokens/s × sparsify's", "× sparsify's with bf16 LM", "peak memory, MB"):
        shown.add_column(column, justify="right")
    for name, each in contestants.items():
        cells = [
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            for ratio in (each["times_sparsify"], each["times_sparsify bf16 LM"])
        ]
        shown.add_row(name, *cells, f"{each['peak_mb']['median']:.0f}")
    return shown


if __name__ == "__main__":
    typer.run(main)
