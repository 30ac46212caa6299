"""Peak memory of one SAE's training, by option, beside eai-sparsify's.

    python benchmarks/memory.py
    python benchmarks/memory.py --gpu

Each row is a process of its own that trains on given activations and reads how far its memory grew (`measure.py`).
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
from common import HERE, activations, hardware, json_from, peer_python, versions
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

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
    gpu: Annotated[bool, typer.Option(help="On the CUDA device.")] = False,
    repeats: Annotated[int, typer.Option(help="Processes per row.", min=1)] = 5,
    peer: Annotated[Path | None, typer.Option(help="A Python that has eai-sparsify.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the numbers go.")] = None,
) -> None:
    """Measure memory."""
    python = peer_python(peer, console.print)
    results = {}
    for text in size or (["4096,131072,64,8192"] if gpu else ["512,16384,32,4096", "768,24576,32,2048"]):
        results[text] = measure(text, python, repeats, gpu)
        shown = Table(title=f"D, M, k, N = {text}", title_justify="left")
        for column in ("", "weights and moments, MB", "peak above, MB"):
            shown.add_column(column)
        for name, each in results[text].items():
            shown.add_row(name, f"{each['held_mb']:.0f}", f"{each['peak_above_mb']:.0f}")
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


def measure(size: str, peer: Path, repeats: int, gpu: bool) -> dict[str, dict[str, float]]:
    """Medians over processes, the contestants in turn."""
    d_in, num_latents, k, tokens = map(int, size.split(","))
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="saekit-memory-") as work:
        folder = Path(work)
        job = {"d_in": d_in, "num_latents": num_latents, "k": k, "steps": 2, "bf16": gpu}
        job |= {"device": "cuda" if gpu else "cpu", "activations": str(folder / "x.safetensors")}
        job |= {"kernels": "auto", "select_dtype": "auto", "moments_dtype": "fp32"}
        save_file({"x": activations(tokens, d_in)}, job["activations"])
        for _ in range(repeats):
            for name, changes in CONTESTANTS.items():
                if gpu and name == "saekit, eager kernels":
                    continue  # its tensors [N, K, D], 8.6 GB each, might not fit
                python, script = (
                    (peer, "peers/sparsify_step.py") if changes is None else (sys.executable, "saekit_step.py")
                )
                runs.setdefault(name, []).append(json_from(python, script, job | (changes or {}), folder))
    return {
        name: {
            "held_mb": own[0]["held_bytes"] / 1e6,
            "peak_above_mb": statistics.median(each["peak_above_bytes"] for each in own) / 1e6,
        }
        for name, own in runs.items()
    }


if __name__ == "__main__":
    typer.run(main)
