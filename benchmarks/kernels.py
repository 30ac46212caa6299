"""Compares each backend's kernels with the eager reference, and a whole SAE step with the machine's own limits.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --gpu
    python benchmarks/kernels.py --auto           # does auto choose the fastest kernels and type?

The floor is the shortest possible time of a step at this machine's rates, which are measured right before and after
the step. It is the sum of three parts: the time of a plain matmul of the encoder's shape in the type that selects; the
operations of the sparse sums, at the rate of a float32 matmul; and the bytes that a step must move, at the bandwidth of
an in-place multiplication (a copy has a lower bandwidth, since it also reads its target). Only bytes that no cache can
save are counted: parameters, moments and activations, each as often as the algorithm must read or write it. Scores are
not counted, because they need not leave the cache. Neither are rows that are gathered again, nor the gradients of
matrices, whose rows need not outlive their update.

Exits with code 1 if a step takes more than 2 × the floor (1.6 × on a GPU), or, with --auto, if the choice of auto is
more than 5% slower than the fastest backend and type.
"""

from __future__ import annotations

from saekit.machine import keep_memory

keep_memory()  # as `saekit train` does

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from common import HERE, activations, auto_type, hardware, spread, versions
from measure import synchronize
from one_unit import OneUnit
from recipes import REFERENCE
from rich.console import Console
from rich.table import Table

from saekit import TrainConfig
from saekit.sae.kernels import Kernels, auto_backend, choose_kernels
from saekit.sae.kernels.fastest import types

CPU_SIZES = ["512,16384,32,4096", "768,24576,32,2048"]
GPU_SIZES = ["4096,131072,64,8192"]
AUTO_SIZES = ["256,4096,32,2048", *CPU_SIZES]
AUTO_WITHIN = 1.05
STREAM_BYTES = {"cpu": 2**29, "cuda": 2**32}
"""Bytes of the tensor that the bandwidth is measured with: large enough that a GPU's launch time is negligible."""
OPERATIONS = ("encode", "forward", "forward and backward", "step", "step, bf16 moments")
console = Console()


def main(
    size: Annotated[list[str] | None, typer.Option(help="D,M,k,N; may be given several times.")] = None,
    gpu: Annotated[bool, typer.Option(help="On the CUDA device, with the default sizes for one.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds of measurements; the result is their median.", min=1)] = 9,
    at_most: Annotated[float | None, typer.Option(help="Largest ratio of a step to the floor.")] = None,
    select_dtype: Annotated[str, typer.Option(help="Type in which candidates are selected.")] = "auto",
    auto: Annotated[bool, typer.Option("--auto", help="Time all backends and types, and compare with auto.")] = False,
    profile: Annotated[bool, typer.Option(help="Also print torch's profile of the fastest backend's step.")] = False,
    out: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    """Measure kernels."""
    device = torch.device("cuda" if gpu else "cpu")
    if auto:
        raise typer.Exit(compare_with_auto(size or (GPU_SIZES if gpu else AUTO_SIZES), device, rounds))
    at_most = at_most or (1.6 if gpu else 2.0)
    results = []
    for text in size or (GPU_SIZES if gpu else CPU_SIZES):
        d_in, num_latents, k, tokens = map(int, text.split(","))
        x_ND = activations(tokens, d_in).to(device)
        select = select_dtype if select_dtype != "auto" else auto_type(text, device)
        backends = [("eager", "fp32"), ("cpu", "fp32"), ("cpu", select)]
        if auto_backend(device) == "native":
            backends += [("native", "fp32"), ("native", select)]
        if gpu:  # eager makes several tensors [N, K, D] of 8.6 GB each, which do not fit next to the others
            backends = [("triton", "fp32"), ("triton", select)]
        kernels = {f"{name} {dtype}": choose_kernels(name, dtype, device) for name, dtype in backends}
        results.append({"size": text, **measure(x_ND, num_latents, k, kernels, rounds)})
        console.print(table(results[-1]))
        if profile:
            console.print(profiled(x_ND, num_latents, k, kernels[list(kernels)[-1]]), soft_wrap=True)
    record = {
        "date": date.today().isoformat(),
        "hardware": hardware() | ({"gpu": torch.cuda.get_device_name()} if gpu else {}),
        "versions": versions(sys.executable),
        "rounds": rounds,
        "results": results,
    }
    out = out or HERE / "results" / ("kernels_gpu.json" if gpu else "kernels.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    missed = [each["size"] for each in results if each["step_over_floor"]["median"] > at_most]
    if missed:
        console.print(f"[red]More than {at_most} × the floor at {', '.join(missed)}")
        raise typer.Exit(1)


def compare_with_auto(sizes: list[str], device: torch.device, rounds: int) -> bool:
    """Time a whole step of every backend and type, in turn, and compare them with the choice of auto.

    Returns:
        Whether auto's choice is too slow at one of the sizes.
    """
    missed = False
    for text in sizes:
        d_in, num_latents, k, tokens = map(int, text.split(","))
        x_ND = activations(tokens, d_in).to(device)
        taken = f"{auto_backend(device)} {auto_type(text, device)}"
        backends = [each for each in ("cpu", "native", "triton") if each in ("cpu", auto_backend(device))]
        pairs = [("eager", "fp32")] * (device.type == "cpu")
        pairs += [(backend, dtype) for backend in backends for dtype in types(device)]
        steps = {
            f"{backend} {dtype}": make_unit(x_ND, num_latents, k, choose_kernels(backend, dtype, device), "fp32").step
            for backend, dtype in pairs
        }
        seconds: dict[str, list[float]] = {}
        for number in range(rounds + 2):
            for name, step in steps.items():
                note(seconds, name, step, device, number >= 2)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        over = medians[taken] / min(medians.values())
        missed = missed or over > AUTO_WITHIN
        shown = ", ".join(
            f"{name} {each * 1e3:.1f}" for name, each in sorted(medians.items(), key=lambda each: each[1])
        )
        console.print(f"D, M, k, N = {text}: auto takes {taken}, {over:.2f} × the fastest; ms of a step: {shown}")
    return missed


def measure(x_ND: torch.Tensor, num_latents: int, k: int, kernels: dict[str, Kernels], rounds: int) -> dict[str, Any]:
    """Measure everything in turn, `rounds` times, after two rounds of warm-up."""
    works = {name: operations(x_ND, num_latents, k, each) for name, each in kernels.items()}
    selects = kernels[list(kernels)[-1]].select_dtype or torch.float32
    rates = machine(x_ND, num_latents, selects)
    seconds: dict[str, list[float]] = {}
    fastest, held = list(works)[-1], "held to the floor"
    for number in range(rounds + 2):
        for name, own in works.items():
            for operation, work in own.items():
                note(seconds, f"{name}: {operation}", work, x_ND.device, number >= 2)
        # Other work on the machine changes its rates within seconds, so measure them right before and after.
        for name, work in (*rates.items(), (held, works[fastest]["step"]), *rates.items()):
            note(seconds, name, work, x_ND.device, number >= 2)
    floors = [
        floor(matmul, matmul32, stream, x_ND, num_latents, k, selects.itemsize)
        for matmul, matmul32, stream in zip(*(in_pairs(seconds[name]) for name in rates), strict=True)
    ]
    first = next(iter(works))
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "selects_in": str(selects).removeprefix("torch."),
        "tera_ops_selecting": 2 * x_ND.numel() * num_latents / statistics.median(seconds["matmul that selects"]) / 1e12,
        "tera_ops_fp32": 2 * x_ND.numel() * num_latents / statistics.median(seconds["matmul fp32"]) / 1e12,
        "gigabytes_per_second": 2 * STREAM_BYTES[x_ND.device.type] / statistics.median(seconds["stream"]) / 1e9,
        "floor": {part: statistics.median(each[part] for each in floors) for part in floors[0]},
        "step_over_floor": spread([step / each["total"] for step, each in zip(seconds[held], floors, strict=True)]),
        "times_first": {
            name: {
                each: spread(
                    [a / b for a, b in zip(seconds[f"{first}: {each}"], seconds[f"{name}: {each}"], strict=True)]
                )
                for each in OPERATIONS
            }
            for name in works
        },
    }


def in_pairs(values: list[float]) -> list[float]:
    """Return the means of the first two values, the next two, and so on."""
    return [(before + after) / 2 for before, after in zip(values[::2], values[1::2], strict=True)]


def machine(x_ND: torch.Tensor, num_latents: int, selects: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the calls that measure the machine's rates: plain torch operations into allocated memory."""
    tokens, d_in = x_ND.shape
    W_DM = torch.randn(num_latents, d_in, device=x_ND.device).t()
    stream = torch.ones(STREAM_BYTES[x_ND.device.type] // 4, device=x_ND.device)

    def matmul(dtype: torch.dtype) -> Callable[[], object]:
        left, right = x_ND.to(dtype), W_DM.to(dtype)
        product, sums = (torch._int_mm, torch.int32) if dtype == torch.int8 else (torch.mm, dtype)
        result = torch.empty(tokens, num_latents, dtype=sums, device=x_ND.device)
        return lambda: product(left, right, out=result)

    return {
        "matmul that selects": matmul(selects),
        "matmul fp32": matmul(torch.float32),
        "stream": lambda: stream.mul_(1.0),
    }


def floor(
    matmul: float, matmul32: float, stream: float, x_ND: torch.Tensor, num_latents: int, k: int, select_bytes: int
) -> dict[str, float]:
    """Return the floor of one step in seconds, from the seconds of the three measurements."""
    tokens, d_in = x_ND.shape
    params = 2 * num_latents * d_in
    # Recomputed scores, decode, its activations' gradient, and the two weight gradients: N·K·D multiply-adds each.
    sparse = 5 * 2 * tokens * k * d_in
    moved = {
        "encoder in the type that selects, and its use": num_latents * d_in * (4 + 2 * select_bytes),
        "rows for exact scores, decode and its gradient": 3 * num_latents * d_in * 4,
        "activations, reconstruction, error and its gradient": 5 * tokens * d_in * 4,
        "Adam": params * 4 * 6,  # reads and writes the parameter and two moments
    }
    parts = {
        "dense": matmul,
        "sparse": sparse * matmul32 / (2 * tokens * d_in * num_latents),
        "memory": sum(moved.values()) * stream / (2 * STREAM_BYTES[x_ND.device.type]),
    }
    return {**parts, "total": sum(parts.values())}


def operations(x_ND: torch.Tensor, num_latents: int, k: int, kernels: Kernels) -> dict[str, Callable[[], object]]:
    """Return the calls to time for one backend, by name."""
    unit = make_unit(x_ND, num_latents, k, kernels, "fp32")
    return {
        "encode": torch.no_grad()(lambda: unit.sae.encode(x_ND)),
        "forward": torch.no_grad()(lambda: unit.sae(x_ND)),
        "forward and backward": unit.passes,
        "step": unit.step,
        "step, bf16 moments": make_unit(x_ND, num_latents, k, kernels, "bf16").step,
    }


def make_unit(
    x_ND: torch.Tensor, num_latents: int, k: int, kernels: Kernels, moments: Literal["fp32", "bf16"]
) -> OneUnit:
    """Make the unit whose whole step is timed, with the reference recipe."""
    return OneUnit(TrainConfig(**REFERENCE, lr=2e-4, moments_dtype=moments), x_ND, num_latents, k, kernels)


def note(
    seconds: dict[str, list[float]], name: str, work: Callable[[], object], device: torch.device, counts: bool
) -> None:
    """Time one piece of work."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    if counts:
        seconds.setdefault(name, []).append(time.perf_counter() - start)


def profiled(x_ND: torch.Tensor, num_latents: int, k: int, kernels: Kernels) -> str:
    """Return a table of where a step's time goes."""
    step = operations(x_ND, num_latents, k, kernels)["step"]
    for _ in range(3):
        step()
    with torch.profiler.profile() as profile:
        for _ in range(3):
            step()
        synchronize(x_ND.device)
    key = "self_cuda_time_total" if x_ND.device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=50)


def table(result: dict[str, Any]) -> Table:
    """Make a table of times, with ratios to the first backend and to the floor."""
    d_in, num_latents, k, tokens = result["size"].split(",")
    floor = result["floor"]
    over = result["step_over_floor"]
    shown = Table(
        title=f"D {d_in}, M {num_latents}, k {k}, N {tokens}",
        title_justify="left",
        caption=f"floor {floor['total'] * 1e3:.0f} ms = dense {floor['dense'] * 1e3:.0f} + sparse "
        f"{floor['sparse'] * 1e3:.0f} + memory {floor['memory'] * 1e3:.0f}; the last backend's step takes "
        f"{over['median']:.2f} × that ({over['min']:.2f} to {over['max']:.2f})",
    )
    shown.add_column("ms (× as fast as the first)")
    for name in result["times_first"]:
        shown.add_column(name, justify="right")
    for operation in OPERATIONS:
        cells = [
            f"{result['seconds'][f'{name}: {operation}']['median'] * 1e3:.0f} ({each[operation]['median']:.1f})"
            for name, each in result["times_first"].items()
        ]
        shown.add_row(operation, *cells)
    return shown


if __name__ == "__main__":
    typer.run(main)
