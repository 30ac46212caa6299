"""Where activations come from, and what it costs: the language model in every step, a cache on disk, mixed steps.

    python benchmarks/sources.py
    python benchmarks/sources.py --repeats 1 --steps 16

Two language models: the demo's, and a GPT-NeoX of six layers of width 512 with random weights. They read random tokens,
and each layer has an SAE. Every command is `saekit`, as it is typed, in a process of its own.

- three runs with different k: live, and from one cache, which is written first
- `--mix`: tokens/s over whole blocks, next to a run without it
- reading a cache as training does, with its checksums, next to reading its files from start to end; both after the
  system was told to forget the files (`posix_fadvise`), and again while it remembers them; on the disk of TMPDIR

Rates are those of the loops. Wall times are those of whole commands, with starting Python, loading and saving.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import HERE, OFFLINE, hardware, spread, versions
from rich.console import Console
from rich.table import Table
from train import VOCABULARY, make_model

from saekit.cache import read_index
from saekit.cache.index import shard_file
from saekit.cache.source import Places
from saekit.demo import MODEL_DIR
from saekit.runs.metrics import read_metrics

K = (16, 32, 64)
CHUNK = 8 * 2**20
"""Bytes that are read at a time from start to end."""
console = Console()


def main(
    steps: Annotated[int, typer.Option(help="Timed steps per run, a multiple of --mix.", min=8)] = 32,
    mix: Annotated[int, typer.Option(help="Steps of a block.", min=2)] = 8,
    ctx_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    repeats: Annotated[int, typer.Option(help="Of everything.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = HERE / "results" / "sources.json",
) -> None:
    """Measure sources."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="saekit-sources-") as work:
        folder = Path(work)
        make_model(6, 512, ctx_len, folder / "gpt-neox")
        for name, model, vocabulary in (
            ("demo", MODEL_DIR, _vocabulary(MODEL_DIR)),
            ("gpt-neox", folder / "gpt-neox", VOCABULARY),
        ):
            tokens = np.random.default_rng(0).integers(3, vocabulary, (mix + steps) * batch_size * ctx_len, np.uint16)
            tokens.tofile(folder / f"{name}.bin")
            sizes = ["--ctx-len", str(ctx_len), "--batch-size", str(batch_size)]
            runs = [
                measure(folder, model, folder / f"{name}.bin", sizes, mix, f"{name}-{number}")
                for number in range(repeats)
            ]
            found[name] = {what: spread([each[what] for each in runs]) for what in runs[0]}
            console.print(table(name, found[name]))
    record = {
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(sys.executable),
        "sizes": {"steps": steps, "mix": mix, "ctx_len": ctx_len, "batch_size": batch_size, "repeats": repeats, "k": K},
        "found": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path, model: Path, data: Path, sizes: list[str], mix: int, name: str) -> dict[str, float]:
    """One repetition: what takes turns with what it is compared with."""
    cache, live, cached = folder / name, [], []
    made, said = saekit("cache", model, data, "--out", cache, *sizes)
    for k in K:
        live.append(run(folder, f"{name}-live-{k}", mix, model, data, *sizes, "--k", k))
        cached.append(run(folder, f"{name}-cached-{k}", mix, "--activations", cache, *sizes, "--k", k))
    mixed = run(folder, f"{name}-mixed", mix, model, data, *sizes, "--k", K[-1], "--mix", mix)
    rate = {what: statistics.median([each[1] for each in runs]) for what, runs in (("live", live), ("cached", cached))}
    making = float(re.findall(r"([\d,]+) tokens/s", said)[-1].replace(",", ""))
    return {
        "live_tokens_per_second": rate["live"],
        "cached_tokens_per_second": rate["cached"],
        "cache_tokens_per_second": making,
        "cached_over_live": rate["cached"] / rate["live"],
        "break_even_runs": (1 / making) / (1 / rate["live"] - 1 / rate["cached"]),
        "three_live_seconds": sum(each[0] for each in live),
        "cache_and_three_cached_seconds": made + sum(each[0] for each in cached),
        "mixed_over_live_step": live[-1][1] / mixed[1],
        **reading(cache),
    }


def saekit(*arguments: object) -> tuple[float, str]:
    """Run a command; returns its seconds, and what it said."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "saekit", *map(str, arguments)]
    env = os.environ | OFFLINE | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began, done.stdout + done.stderr


def run(folder: Path, name: str, warm_up: int, *arguments: object) -> tuple[float, float]:
    """Train; returns the command's seconds, and the loop's tokens/s after the steps of warm-up."""
    sizes = ("--expansion-factor", 8, "--save-dir", folder, "--run-name", name)
    seconds, _ = saekit("train", *arguments, *sizes)
    lines = read_metrics(folder / name / "metrics.jsonl")
    first, last = lines[warm_up - 1], lines[-1]
    return seconds, (last["tokens"] - first["tokens"]) / (last["time"] - first["time"])


def reading(folder: Path) -> dict[str, float]:
    """Bytes/s of a cache, as training reads it and from start to end, before and after the system knows the files."""
    index = read_index(folder)
    files = [shard_file(folder, shard) for shard in range(index.num_shards)]
    size = sum(file.stat().st_size for file in files)
    found: dict[str, float] = {"cache_bytes": size}
    for kind, read in (("cached", lambda: _as_training(folder)), ("sequential", lambda: _from_start_to_end(files))):
        forget(files)
        for state in ("cold", "warm"):
            began = time.perf_counter()
            read()
            found[f"{kind}_{state}_bytes_per_second"] = size / (time.perf_counter() - began)
    for state in ("cold", "warm"):
        part = found[f"cached_{state}_bytes_per_second"] / found[f"sequential_{state}_bytes_per_second"]
        found[f"reading_{state}_over_sequential"] = part
    return found


def forget(files: list[Path]) -> None:
    """Have the system write files to the disk and drop them from its memory."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _as_training(folder: Path) -> None:
    index = read_index(folder)
    places = Places(folder, index, np.arange(index.sequences))
    for start, stop in itertools.pairwise([*range(0, index.sequences, index.batch_size), index.sequences]):
        for name in index.hookpoints:
            places.acts(np.arange(start, stop), name)


def _from_start_to_end(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def _vocabulary(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def table(name: str, found: dict[str, Any]) -> Table:
    """Medians, least and most."""
    shown = Table("", name, title_justify="left")
    for what, each in found.items():
        shown.add_row(what, f"{each['median']:,.3g} ({each['min']:,.3g} to {each['max']:,.3g})")
    return shown


if __name__ == "__main__":
    typer.run(main)
