"""What there is to run on: this machine, or one that is described."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from saekit.errors import UserError
from saekit.planning.rates import Rates, device_key, read_rates

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
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
    """How fast a device is, if it is here and has been measured."""
    note: str | None = None
    """Why there are no rates though there is a file of them."""

    @property
    def on_gpu(self) -> bool:
        """Whether ranks have GPUs."""
        return self.kind == "cuda"

    @property
    def capacity(self) -> int:
        """Bytes that a rank can have."""
        return self.memory if self.on_gpu else self.memory // self.count

    @property
    def libraries(self) -> int:
        """Bytes of a rank that are not its tensors'."""
        return LIBRARIES[self.kind]

    @property
    def device(self) -> torch.device:
        """What kernels and types are chosen for."""
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
        return Machine("cpu", processes or 1, memory_limit(), f"CPU with {cores} cores", model, rates, note)
    if processes is not None and processes > gpus:
        raise UserError(f"{processes} processes, but this machine has {gpus} GPUs: describe others with --gpu-memory")
    least = min(map(torch.cuda.get_device_properties, range(gpus)), key=lambda each: each.total_memory)
    rates, note = read_rates(device_key(least.name))
    return Machine("cuda", processes or gpus, least.total_memory, least.name, least.name, rates, note)


def cpu_model() -> str:
    """The CPU's name, which is not unique: `device_key` adds what else rates depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe(gpus: int, gpu_memory: str) -> Machine:
    """A machine by what the user says of it.

    Raises:
        UserError: If the size cannot be read.
    """
    return Machine("cuda", gpus, parse_size("--gpu-memory", gpu_memory), f"GPU of {gpu_memory}")


def parse_size(option: str, text: str) -> int:
    """`"80GiB"`, `"80 GB"` or `"80G"` → bytes; without a unit GiB are meant if the number is small.

    Raises:
        UserError: If it is not a positive size; `option` is named in it.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or not float(found[1]) or found[2] == "I":
        raise UserError(f"{option} {text!r}: expected a size such as 80GiB or 80GB")
    number, unit = float(found[1]), found[2]
    if not unit and number < 10_000:
        unit = "GI"
    return round(number * UNITS[unit])


def memory_limit() -> int:
    """Bytes of this machine's memory, or of the container's if that may take less."""
    limit = psutil.virtual_memory().total
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            limit = min(limit, int(file.read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return limit
