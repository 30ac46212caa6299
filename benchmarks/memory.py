"""Measures the peak memory of training one SAE, by option, compared with eai-sparsify and with `saekit plan`.

    python benchmarks/memory.py
    python benchmarks/memory.py --gpu

Each row is a separate process that trains on given activations and reads the growth of its memory (`measure.py`). The
plan counts tensors, as a GPU's allocator does. With --gpu, the script exits with code 1 if a peak, including weights
and moments, differs from the plan by more than 10%. On a CPU, resident memory was 40 to 110 MB above the plan. Buffers
of libraries are the likely cause (not investigated), and `saekit plan` has an allowance for them.
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
from common import HERE, activations, auto_type, hardware, json_from, peer_python, versions
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from saekit import SaeConfig, TrainConfig
from saekit.placement.costs import Size
from saekit.planning.bank import layer_cost, on_meta
from saekit.planning.memory import Moment, RankMemory
from saekit.sae.kernels import choose_kernels

CONTESTANTS: dict[str, dict[str, Any] | None] = {
    "saekit": {},
    "saekit, fp32 selects": {"select_dtype": "fp32"},
    "saekit, bf16 moments": {"moments_dtype": "bf16"},
    "saekit, eager kernels": {"kernels": "eager", "select_dtype": "fp32"},
    "sparsify": None,
}
console = Console()


def main(
    size: Annotated[list[str] | None, typer.Option(help="D,M,k,N; may be given several times.")] = None,
    gpu: Annotated[bool, typer.Option(help="Run on the CUDA device.")] = False,
    repeats: Annotated[int, typer.Option(help="Processes per row.", min=1)] = 5,
    peer: Annotated[Path | None, typer.Option(help="Python of an environment with eai-sparsify.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Measure memory."""
    python = peer_python(peer, console.print)
    results = {}
    for text in size or (["4096,131072,64,8192"] if gpu else ["512,16384,32,4096", "768,24576,32,2048"]):
        results[text] = measure(text, python, repeats, gpu)
        shown = Table(title=f"D, M, k, N = {text}", title_justify="left")
        for column in (
            "",
            "weights and moments, MB",
            "peak above, MB",
            "planned above, MB",
            "measured / planned, total",
        ):
            shown.add_column(column, justify="right" if column else "left")
        for name, each in results[text].items():
            plan = ("", "")
            if "planned_mb" in each:
                plan = (f"{each['planned_mb'] - each['held_mb']:.0f}", f"{each['over_plan']:.2f}")
            shown.add_row(name, f"{each['held_mb']:.0f}", f"{each['peak_above_mb']:.0f}", *plan)
        console.print(shown)
    record = {
        "date": date.today().isoformat(),
        "hardware": hardware() | ({"gpu": torch.cuda.get_device_name()} if gpu else {}),
        "versions": {"ours": versions(sys.executable), "peer": versions(python)},
        "repeats": repeats,
        "results": results,
    }
    out = out or HERE / "results" / ("memory_gpu.json" if gpu else "memory.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if gpu and any(abs(each.get("over_plan", 1.0) - 1) > 0.1 for size in results.values() for each in size.values()):
        raise typer.Exit(1)


def measure(size: str, peer: Path, repeats: int, gpu: bool) -> dict[str, dict[str, float]]:
    """Run the contestants in turn, and return medians over processes."""
    d_in, num_latents, k, tokens = map(int, size.split(","))
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="saekit-memory-") as work:
        folder = Path(work)
        job = {"d_in": d_in, "num_latents": num_latents, "k": k, "steps": 2, "bf16": gpu}
        job |= {"device": "cuda" if gpu else "cpu", "activations": str(folder / "x.safetensors")}
        select = auto_type(size, torch.device(job["device"]))
        job |= {"kernels": "auto", "select_dtype": select, "moments_dtype": "fp32"}
        save_file({"x": activations(tokens, d_in)}, job["activations"])
        for _ in range(repeats):
            for name, changes in CONTESTANTS.items():
                if gpu and name == "saekit, eager kernels":
                    continue  # its tensors [N, K, D] of 8.6 GB each might not fit
                python, script = (
                    (peer, "peers/sparsify_step.py") if changes is None else (sys.executable, "saekit_step.py")
                )
                runs.setdefault(name, []).append(json_from(python, script, job | (changes or {}), folder))
    found = {
        name: {
            "held_mb": own[0]["held_bytes"] / 1e6,
            "peak_above_mb": statistics.median(each["peak_above_bytes"] for each in own) / 1e6,
        }
        for name, own in runs.items()
    }
    for name, each in found.items():
        changes = CONTESTANTS[name]
        if changes is not None:
            each["planned_mb"] = planned_bytes(job | changes, tokens) / 1e6
            each["over_plan"] = (each["held_mb"] + each["peak_above_mb"]) / each["planned_mb"]
    return found


def planned_bytes(job: dict[str, Any], tokens: int) -> int:
    """Return the peak of the job's training according to `saekit plan`, including weights and moments."""
    device = torch.device(job["device"])
    on_gpu = device.type == "cuda"
    kernels = choose_kernels(job["kernels"], job["select_dtype"], device)
    cost = layer_cost(
        TrainConfig(sae=SaeConfig(num_latents=job["num_latents"], k=job["k"]), moments_dtype=job["moments_dtype"]),
        Size(job["num_latents"], job["d_in"], job["d_in"]),
        tokens,
        torch.bfloat16 if job["bf16"] else torch.float32,
        on_meta(kernels.name, kernels.select_dtype),
        on_gpu=on_gpu,
        owns_gradient=True,
    )
    held = {"parameters": cost.parameters, "optimizer_state": cost.state, "gradients": cost.gradients}
    moments = (Moment("passes", **held, working=cost.first_chunk), Moment("update", **held, working=cost.update))
    return RankMemory(moments).total


if __name__ == "__main__":
    typer.run(main)
