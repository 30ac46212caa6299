"""Measures this machine's rates in less than a minute, with small SAEs and model blocks; the fastest round counts."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from saekit.config import SaeConfig, TrainConfig
from saekit.errors import UserError
from saekit.placement.costs import Size
from saekit.placement.network import measure_network
from saekit.planning.layer import Layer
from saekit.planning.machine import Machine
from saekit.planning.rates import Network, PassCost, Rates, device_key, keep_rates, optimizer_key
from saekit.planning.speed import DENSE_PASSES, MUON_WIDTH
from saekit.sae.kernels import auto_backend, choose_kernels, has_fast_bf16, has_fast_int8

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The types in which the language model may run."""
ROUNDS = 5
"""The number of timed rounds; the fastest counts."""
LATENTS = 16384
"""Latents of the SAE on which optimizers are timed."""
OPTIMIZERS = (
    TrainConfig(),
    TrainConfig(moments_dtype="bf16"),
    TrainConfig(optimizer="adam8bit"),
    TrainConfig(optimizer="signum"),
    TrainConfig(optimizer="muon"),
)
Shape = tuple[int, int, int, int]
"""N, D, M and k of a pass."""


class MeasuredRates(NamedTuple):
    """The result of `measure_rates`."""

    found: dict[str, Rates]
    """The rates by name of each kind of device."""
    file: Path
    """The file that stores them."""
    busy: float
    """The share of the CPU that was in use just before the measurement. Other work makes rates too low."""


def measure_rates(machine: Machine, say: Callable[[str], None]) -> MeasuredRates:
    """Measure this machine's rates and store them in the user's cache.

    Args:
        machine: From `detect`. The network is measured between its number of ranks, on a CPU at least 2.
        say: Receives progress messages.

    Raises:
        UserError: If ranks cannot meet, or the file cannot be written.
    """
    busy = psutil.cpu_percent(1.0) / 100
    devices = {machine.model: torch.device("cpu")}
    if machine.on_gpu:
        numbers = reversed(range(torch.cuda.device_count()))  # the first GPU of each kind is measured
        devices = {torch.cuda.get_device_name(number): torch.device("cuda", number) for number in numbers}
    ranks = machine.count if machine.on_gpu else max(2, machine.count)
    network = {}
    if ranks > 1:
        say(f"Measuring the network between {ranks} ranks")
        network[ranks] = Network(*measure_network(ranks))
    found = {name: measure(device, network, say) for name, device in devices.items()}
    file = keep_rates({device_key(name): rates for name, rates in found.items()})
    return MeasuredRates(found, file, busy)


def measure(device: torch.device, network: Mapping[int, Network], say: Callable[[str], None]) -> Rates:
    """Measure the rates of one device, on a CPU with all threads of this process.

    Args:
        device: The device.
        network: The rates between ranks, by number of ranks.
        say: Receives progress messages.
    """
    scale = 4 if device.type == "cuda" else 1  # a factor on widths, to keep a GPU busy
    say("Measuring matmuls and memory")
    types = [*TYPES, *(["int8"] if has_fast_int8(device) else [])]
    matmul = {name: _matmul(name, device, scale) for name in types}
    bandwidth = _bandwidth(device)
    say("Measuring blocks of a language model")
    block = {name: _block(TYPES[name], matmul[name], device, scale) for name in TYPES}
    passes = {}
    for backend, select in _kernels(device):
        say(f"Measuring SAEs with the {backend} kernels, selecting in {select}")
        passes[f"{backend} {select}"] = _passes(backend, select, matmul[select], device, scale)
    say("Measuring optimizers")
    return Rates(date.today().isoformat(), matmul, bandwidth, block, passes, dict(_updates(device)), network)


def fastest(work: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Return the seconds of the fastest round after a warm-up, since other work on the machine only adds time."""
    seconds = []
    for _ in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _matmul(name: str, device: torch.device, scale: int) -> float:
    """Return operations per second of a matmul with the encoder's usual proportions."""
    N, D, M = 1024, 512 * scale, 8192 * scale
    if name == "int8":
        left, right = (torch.randint(-99, 99, shape, dtype=torch.int8, device=device) for shape in ((N, D), (M, D)))
        out = torch.empty(N, M, dtype=torch.int32, device=device)
        return 2 * N * D * M / fastest(lambda: torch._int_mm(left, right.t(), out=out), device)
    left, right = (torch.randn(shape, device=device).to(TYPES[name]) for shape in ((N, D), (M, D)))
    out = torch.empty(N, M, dtype=TYPES[name], device=device)
    return 2 * N * D * M / fastest(lambda: torch.mm(left, right.t(), out=out), device)


def _bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / fastest(lambda: target.copy_(source), device)


def _block(dtype: torch.dtype, rate: float, device: torch.device, scale: int) -> float:
    """Return seconds per token, dimension and block of a small Llama with random weights, without its matmuls."""
    from transformers import LlamaConfig, LlamaModel

    width, blocks, batch, ctx_len = 512 * scale, 2, 4, 256
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=ctx_len,
    )
    with device:
        model = LlamaModel(config).to(dtype).eval()
        ids = torch.randint(0, 512, (batch, ctx_len))
    matrices = sum(parameter.numel() for parameter in model.layers.parameters() if parameter.ndim == 2)
    operations = batch * ctx_len * (2 * matrices + 2 * ctx_len * width * blocks)
    with torch.inference_mode():
        seconds = fastest(lambda: model(input_ids=ids, use_cache=False), device)
    return max(0.0, seconds - operations / rate) / (batch * ctx_len * width * blocks)


def _kernels(device: torch.device) -> Iterator[tuple[str, str]]:
    """Yield the kernels and types of selection that training may use on a device."""
    backend = auto_backend(device)
    yield "eager", "fp32"
    yield backend, "fp32"
    if has_fast_bf16(device):
        yield backend, "bf16"
    if has_fast_int8(device):
        yield backend, "int8"


def shapes(scale: int) -> list[Shape]:
    """Return shapes of passes that tell the kinds of work apart: each kind dominates in one of them."""
    few = [
        (128, 128, 512, 4),
        (1024, 256, 1024, 64),
        (1024, 256, 8192, 16),
        (1024, 512, 4096, 64),
        (256, 512, 16384, 16),
        (128, 1024, 8192, 32),
        (2048, 512, 4096, 32),
    ]
    return [(N, D * scale, M * scale, k) for N, D, M, k in few]


def _passes(backend: str, select: str, rate: float, device: torch.device, scale: int) -> PassCost:
    """Fit a `PassCost` to the time of real passes without the encoder's matmul."""
    rows, left = [], []
    for N, D, M, k in shapes(scale):
        dense = 2 * N * M * D * DENSE_PASSES.get(backend, 1) / rate
        seconds = _pass((N, D, M, k), backend, select, device)
        rows.append([N * M / seconds, N * k * D / seconds, M * D / seconds, 1 / seconds])
        left.append((seconds - dense) / seconds)  # relative, so that small shapes count as much as large ones
    return PassCost(*nonnegative_least_squares(rows, left))


def _pass(shape: Shape, backend: str, select: str, device: torch.device) -> float:
    """Return the seconds of a layer's forward and backward pass over a chunk of tokens."""
    N, D, M, k = shape
    cfg = TrainConfig(sae=SaeConfig(num_latents=M, k=k))
    layer = Layer(cfg, Size(M, D, D), choose_kernels(backend, select, device), device)
    chunk_ND = torch.randn(N, D, device=device)

    def work() -> None:
        layer.optimizer.zero_grad()
        layer.passes(chunk_ND)

    return fastest(work, device)


def _updates(device: torch.device) -> Iterator[tuple[str, float]]:
    """Measure the seconds per parameter of each optimizer that works on this device."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its warnings about 4 bits do not matter here
    for cfg in OPTIMIZERS:
        kernels = choose_kernels("auto", "fp32", device)
        try:
            layer = Layer(cfg, Size(LATENTS, MUON_WIDTH, MUON_WIDTH), kernels, device)
            parameters = list(layer.sae.parameters())
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 1e-3)
            seconds = fastest(layer.update, device, 1 if cfg.optimizer == "muon" else ROUNDS)
        except (UserError, RuntimeError):  # the library is missing or does not run here: the rate stays unknown
            continue
        yield (
            optimizer_key(cfg.optimizer, cfg.moments_dtype),
            seconds / sum(parameter.numel() for parameter in parameters),
        )


def nonnegative_least_squares(rows: list[list[float]], wanted: list[float]) -> list[float]:
    """Solve least squares with coefficients of at least 0.

    Tries every set of columns, and takes the best solution without a negative coefficient. For few columns only.

    Args:
        rows: One row per equation, one column per coefficient.
        wanted: The right-hand side of each equation.
    """
    A, b = torch.tensor(rows, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    scale = A.norm(dim=0)
    best, found = float(b.square().sum()), torch.zeros(A.shape[1], dtype=torch.float64)
    for count in range(1, A.shape[1] + 1):
        for columns in map(list, itertools.combinations(range(A.shape[1]), count)):
            some = A[:, columns] / scale[columns]
            solution = torch.linalg.lstsq(some, b).solution
            error = float((some @ solution - b).square().sum())
            if bool((solution >= 0).all()) and error < best:
                best, found = error, torch.zeros_like(found)
                found[columns] = solution / scale[columns]
    return found.tolist()
