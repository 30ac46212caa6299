"""Compares a training step of one SAE on given activations in saekit and in eai-sparsify.

    python benchmarks/step.py                 # two sizes on the CPU
    python benchmarks/step.py --gpu           # one layer of Llama-3-8B at 32×, on a CUDA device
    python benchmarks/step.py --size 512,16384,32,4096

Each repetition starts one process per contestant, one after the other, so that a slow period of the machine affects
all of them. A process warms up, times steps, and reads its own peak memory. Contestants:

- saekit: as `saekit train` runs it, or with `--select-dtype`.
- saekit fp32: selects in fp32.
- sparsify: a step of its Trainer with `optimizer="adam"`, without bitsandbytes (so with torch's Adam).
- sparsify huge pages: the same with the allocator setting that `saekit train` makes for itself (on a CPU only).

Exits with code 1 if saekit is less than `--at-least` times as fast as sparsify, or takes more than half its memory.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import HERE, activations, auto_type, hardware, json_from, peer_python, spread, versions
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

CPU_SIZES = ["512,16384,32,4096", "768,24576,32,2048"]
GPU_SIZES = ["4096,131072,64,8192"]
CONTESTANTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "saekit": ({}, {}),
    "sparsify": ({}, {}),
    "saekit fp32": ({"select_dtype": "fp32"}, {}),
    "sparsify huge pages": ({}, {"THP_MEM_ALLOC_ENABLE": "1"}),
}
"""What each contestant changes in the job and in the environment."""
MEMORY_LIMIT = 0.5
"""The largest ratio of saekit's memory to sparsify's."""
console = Console()


def main(
    size: Annotated[list[str] | None, typer.Option(help="D,M,k,N; may be given several times.")] = None,
    gpu: Annotated[bool, typer.Option(help="On the CUDA device, with the default sizes for one.")] = False,
    repeats: Annotated[int, typer.Option(help="Processes per contestant and size.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Timed steps per process.", min=1)] = 7,
    at_least: Annotated[
        float | None, typer.Option(help="Smallest ratio to sparsify's tokens/s; by default 4 on a CPU, 2 on a GPU.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Contestants in addition to saekit and sparsify; repeatable.")
    ] = None,
    select_dtype: Annotated[str, typer.Option(help="saekit's type of selection: auto, fp32, bf16 or int8.")] = "auto",
    peer: Annotated[Path | None, typer.Option(help="Python of an environment with eai-sparsify.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Measure steps."""
    names = only or [name for name in CONTESTANTS if not (gpu and name == "sparsify huge pages")]
    if unknown := set(names) - CONTESTANTS.keys():
        raise typer.BadParameter(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(CONTESTANTS)}")
    python = peer_python(peer, console.print)
    at_least = at_least or (2.0 if gpu else 4.0)
    out = out or HERE / "results" / ("step_gpu.json" if gpu else "step.json")
    results = []
    for text in size or (GPU_SIZES if gpu else CPU_SIZES):
        d_in, num_latents, k, tokens = map(int, text.split(","))
        job = {"d_in": d_in, "num_latents": num_latents, "k": k, "steps": steps, "bf16": gpu}
        select = select_dtype if select_dtype != "auto" else auto_type(text, torch.device("cuda" if gpu else "cpu"))
        job |= {"device": "cuda" if gpu else "cpu", "kernels": "auto", "select_dtype": select}
        job |= {"moments_dtype": "fp32"}
        results.append({"size": text, **measure(job, tokens, python, repeats, names)})
        console.print(table(results[-1]))
    record = {
        "date": date.today().isoformat(),
        "hardware": hardware() | ({"gpu": torch.cuda.get_device_name()} if gpu else {}),
        "versions": {"ours": versions(sys.executable), "peer": versions(python)},
        "repeats": repeats,
        "steps": steps,
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    missed = [
        each["size"]
        for each in results
        if each["contestants"]["saekit"]["times_sparsify"]["median"] < at_least
        or each["contestants"]["saekit"]["memory_of_sparsify"]["median"] > MEMORY_LIMIT
    ]
    if missed:
        console.print(f"[red]Missed {at_least} × the tokens/s at {MEMORY_LIMIT} × the memory at {', '.join(missed)}")
        raise typer.Exit(1)


def measure(job: dict[str, Any], tokens: int, peer: Path, repeats: int, names: list[str]) -> dict[str, Any]:
    """Run saekit, sparsify and the named contestants in turn, `repeats` times."""
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="saekit-step-") as work:
        folder = Path(work)
        job = job | {"activations": str(folder / "x.safetensors")}
        save_file({"x": activations(tokens, job["d_in"])}, job["activations"])
        for _ in range(repeats):
            for name in dict.fromkeys(("saekit", "sparsify", *names)):
                changes, env = CONTESTANTS[name]
                theirs = name.startswith("sparsify")
                python, script = (peer, "peers/sparsify_step.py") if theirs else (sys.executable, "saekit_step.py")
                runs.setdefault(name, []).append(json_from(python, script, job | changes, folder, **env))
    contestants = {}
    for name, own in runs.items():
        pairs = list(zip(own, runs["sparsify"], strict=True))
        contestants[name] = {
            "tokens_per_second": spread([each["tokens_per_second"] for each in own]),
            "times_sparsify": spread([a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs]),
            "peak_above_mb": spread([each["peak_above_bytes"] / 1e6 for each in own]),
            "memory_of_sparsify": spread([a["peak_above_bytes"] / b["peak_above_bytes"] for a, b in pairs]),
            "held_mb": own[0]["held_bytes"] / 1e6,
            "fvu_after": statistics.median(each["fvu"] for each in own),
            "kernels": own[0].get("kernels"),
        }
    return {"contestants": contestants}


def table(result: dict[str, Any]) -> Table:
    """Make a table of ratios to sparsify: median (minimum to maximum)."""
    d_in, num_latents, k, tokens = result["size"].split(",")
    shown = Table(title=f"D {d_in}, M {num_latents}, k {k}, N {tokens}", title_justify="left")
    for column in ("", "tokens/s × sparsify's", "memory above weights and moments, MB", "× sparsify's"):
        shown.add_column(column, justify="right" if column else "left")
    for name, each in result["contestants"].items():
        speed, memory = each["times_sparsify"], each["memory_of_sparsify"]
        shown.add_row(
            name,
            f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})",
            f"{each['peak_above_mb']['median']:.0f}",
            f"{memory['median']:.2f}",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
