"""Measures time and peak memory of training steps in this process. Needs only torch, so that peers can use it, too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

WARM_UP_SECONDS = 4.0
"""The first steps are slow, because the operating system must first provide the memory."""


def time_steps(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Return the seconds of each of `count` steps, after a warm-up of at least 3 steps."""
    start, done = time.perf_counter(), 0
    while done < 3 or (time.perf_counter() - start < WARM_UP_SECONDS and done < 20):
        step()
        synchronize(device)
        done += 1
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


class PeakMemory:
    """The growth of memory to its peak since this object was made, in bytes.

    On a GPU: memory of torch's allocator. On a CPU: the process's resident set (Linux only).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.before = _resident("VmRSS")

    def bytes(self) -> int:
        """Return the growth to the peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _resident("VmHWM") - self.before


def summary(seconds: list[float], tokens: int, peak: int, held: Iterable[Tensor]) -> dict[str, float]:
    """Return what a worker prints.

    Args:
        seconds: The seconds of each step.
        tokens: Tokens per step.
        peak: The growth of memory to its peak, in bytes, including weights and optimizer state.
        held: Weights and optimizer state.
    """
    weights = sum(tensor.numel() * tensor.element_size() for tensor in held)
    return {
        "seconds": statistics.median(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
        "held_bytes": weights,
        "peak_above_bytes": peak - weights,
    }


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if the device is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
