"""The machine of a plan: this machine, or one that the user describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from saekit.errors import UserError
from saekit.machine import cpu_model, usable_memory
from saekit.planning.rates import Rates, device_key, read_rates
from saekit.units import parse_size

LIBRARIES = {"cpu": 600_000_000, "cuda": 2**30}
"""Bytes of a process in addition to its tensors. On a CPU: the libraries (measured: 0.56 GB). On a GPU: an estimate for
CUDA's context, the libraries' workspaces and the allocator's fragmentation (not measured)."""


@dataclass(frozen=True)
class Machine:
    """One or more devices of one kind. Processes on a CPU share its memory."""

    kind: Literal["cpu", "cuda"]
    count: int
    """GPUs, or processes on the CPU: the number of ranks."""
    memory: int
    """Bytes of each GPU, or of the whole machine for a CPU."""
    name: str
    """The name to show."""
    model: str = ""
    """The manufacturer's name of the device; empty for a described machine."""
    rates: Rates | None = None
    """The device's rates, if it is in this machine and has been measured."""
    note: str | None = None
    """Why the file of rates cannot be used, if there is one."""

    @property
    def on_gpu(self) -> bool:
        """Tell whether ranks have GPUs."""
        return self.kind == "cuda"

    @property
    def capacity(self) -> int:
        """Return the bytes that a rank can use."""
        return self.memory if self.on_gpu else self.memory // self.count

    @property
    def libraries(self) -> int:
        """Return the bytes that a rank needs in addition to its tensors."""
        return LIBRARIES[self.kind]

    @property
    def device(self) -> torch.device:
        """Return the device for which kernels and types are chosen."""
        return torch.device(self.kind)


def detect(processes: int | None = None) -> Machine:
    """Return this machine: its GPUs (as if all had the memory of the smallest), or its CPU if it has none.

    Reads its rates from the user's cache.

    Args:
        processes: The number of ranks. None for all GPUs, or for one process on a CPU.

    Raises:
        UserError: If there are fewer GPUs than `processes`.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        cores, model = psutil.cpu_count(logical=False) or 1, cpu_model()
        rates, note = read_rates(device_key(model))
        return Machine("cpu", processes or 1, usable_memory(), f"CPU with {cores} cores", model, rates, note)
    if processes is not None and processes > gpus:
        raise UserError(
            f"{processes} processes need as many GPUs, but this machine has {gpus}: describe others with --gpu-memory"
        )
    least = min(map(torch.cuda.get_device_properties, range(gpus)), key=lambda each: each.total_memory)
    rates, note = read_rates(device_key(least.name))
    return Machine("cuda", processes or gpus, least.total_memory, least.name, least.name, rates, note)


def describe(gpus: int, gpu_memory: str) -> Machine:
    """Return a machine that the user describes.

    Args:
        gpus: The number of GPUs.
        gpu_memory: The memory of each, such as `80GB`.

    Raises:
        UserError: If the size cannot be read.
    """
    return Machine("cuda", gpus, parse_size("--gpu-memory", gpu_memory), f"GPU of {gpu_memory}")
