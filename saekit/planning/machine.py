"""The machine of a plan: this one, or one that is described."""

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
"""Bytes of a process besides its tensors: on a CPU what the libraries take (measured 0.56 GB); on a GPU an allowance
for CUDA's context, the libraries' workspaces and the allocator's gaps (not measured)."""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind; on a CPU any number of processes share its memory."""

    kind: Literal["cpu", "cuda"]
    count: int
    """GPUs, or processes on the CPU: the number of ranks."""
    memory: int
    """Bytes of each GPU, or of the whole machine for a CPU."""
    name: str
    """To be shown."""
    model: str = ""
    """As its maker calls a device, for a machine that is here."""
    rates: Rates | None = None
    """The device's rates, if it is here and has been measured."""
    note: str | None = None
    """Why there are no rates though there is a file of them."""

    @property
    def on_gpu(self) -> bool:
        """Tell whether ranks have GPUs."""
        return self.kind == "cuda"

    @property
    def capacity(self) -> int:
        """Return bytes that a rank can have."""
        return self.memory if self.on_gpu else self.memory // self.count

    @property
    def libraries(self) -> int:
        """Return bytes of a rank that are not its tensors'."""
        return LIBRARIES[self.kind]

    @property
    def device(self) -> torch.device:
        """Return the device for which kernels and types are chosen."""
        return torch.device(self.kind)


def detect(processes: int | None = None) -> Machine:
    """This machine: its GPUs if it has any (the one with the least memory stands for all), else its CPU.

    Its rates are read from the user's cache.

    Args:
        processes: How many ranks; all GPUs, or one process on a CPU, if None.

    Raises:
        UserError: If there are fewer GPUs.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        cores, model = psutil.cpu_count(logical=False) or 1, cpu_model()
        rates, note = read_rates(device_key(model))
        return Machine("cpu", processes or 1, usable_memory(), f"CPU with {cores} cores", model, rates, note)
    if processes is not None and processes > gpus:
        raise UserError(f"{processes} processes, but this machine has {gpus} GPUs: describe others with --gpu-memory")
    least = min(map(torch.cuda.get_device_properties, range(gpus)), key=lambda each: each.total_memory)
    rates, note = read_rates(device_key(least.name))
    return Machine("cuda", processes or gpus, least.total_memory, least.name, least.name, rates, note)


def describe(gpus: int, gpu_memory: str) -> Machine:
    """Return a machine by what the user says of it.

    Raises:
        UserError: If the size cannot be read.
    """
    return Machine("cuda", gpus, parse_size("--gpu-memory", gpu_memory), f"GPU of {gpu_memory}")
