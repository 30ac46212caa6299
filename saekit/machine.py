"""Find out what this process can use, within its container's limits: memory, cores, libraries."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import psutil

from saekit._version import __version__

if TYPE_CHECKING:
    import torch

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where control groups are mounted, and the file that lists this process's groups."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
MMAP_FROM = 32 * 2**20
"""Bytes from which malloc uses mmap: the largest threshold that glibc allows."""
NEVER = 2**31 - 1


def library_versions() -> dict[str, str]:
    """Return the versions of Python, saekit and the libraries that results can depend on."""
    return {"python": platform.python_version(), "saekit": __version__, **_installed()}


@cache
def _installed() -> Mapping[str, str]:
    """Read each package's metadata once: every save records the versions, and reading takes milliseconds each."""
    found = {}
    for name in ("torch", "transformers", "datasets", "accelerate", "safetensors", "deepspeed", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return MappingProxyType(found)


def cpu_model(listing: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's name, or its architecture if the system gives no name. Different CPUs can share a name."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", listing.read_text("utf-8", errors="replace"), re.MULTILINE)
    except OSError:  # not Linux
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Return saekit's cache folder: `$XDG_CACHE_HOME/saekit`, by default `~/.cache/saekit`.

    If that is not writable, return a temporary folder of this process.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "saekit"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        pass
    return _folder_of_this_process()


@cache
def _folder_of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="saekit-"))


def usable_memory(root: Path = GROUPS, own: Path = OWN_GROUPS) -> int:
    """Return how many bytes this process may use: the machine's memory, or less in a container or a job.

    Args:
        root: Where control groups are mounted.
        own: The file that lists this process's groups.
    """
    total = psutil.virtual_memory().total
    return min((limit for _, limit in _memory_limits(total, root, own)), default=total)


def free_memory() -> tuple[int, int, int | None]:
    """Return, in bytes, the memory free for this process, the machine's memory, and this process's limit or None."""
    machine = psutil.virtual_memory()
    capped = memory_limit(machine.total)
    if capped is None:
        return machine.available, machine.total, None
    limit, left = capped
    return min(machine.available, left), machine.total, limit


def memory_limit(total: int, root: Path = GROUPS, own: Path = OWN_GROUPS) -> tuple[int, int] | None:
    """Return the memory limit that leaves this process the least, and what is left of it, in bytes; None without one.

    Args:
        total: The machine's memory, in bytes. Limits at or above it are ignored.
        root: Where control groups are mounted.
        own: The file that lists this process's groups.
    """
    left, limit = min(_memory_limits(total, root, own), default=(0, None))
    return None if limit is None else (limit, left)


def usable_cores(root: Path = GROUPS, own: Path = OWN_GROUPS) -> tuple[int, int]:
    """Return how many cores this process may use, and how many hardware threads they have.

    Takes CPU affinity and the quotas of control groups into account.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu", root, own):
        share = _cpu_quota(folder)
        if share is not None:
            allowed = min(allowed, max(1, math.ceil(share)))
    return min(psutil.cpu_count(logical=False) or allowed, allowed), allowed


def keep_memory() -> None:
    """Make the allocator use large pages and keep freed memory for the next step.

    Every step allocates and frees the same tensors. Memory returned to the operating system comes back by page faults
    and must be zeroed, which took up to a third of a step on a CPU (docs/performance-kernels.md). Call this before the
    first large tensor: torch reads its setting only once. With a C library other than glibc, only torch's setting
    changes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def _memory_limits(total: int, root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Yield for each of this process's control groups what is left of its memory limit, and the limit, in bytes."""
    for folder in _groups("memory", root, own):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        if limit is not None and limit < total:
            # The page cache counts as used, but the kernel frees it when memory is needed.
            yield max(0, limit - used + _file_pages(folder / "memory.stat")), limit


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups and their parents, for cgroup versions 1 and 2."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = root / controller if names else root
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such file, or it contains `max`
        return None


def _file_pages(stat: Path) -> int:
    try:
        lines = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0
    return int(lines.get("total_inactive_file") or lines.get("inactive_file") or 0)


def _cpu_quota(folder: Path) -> float | None:
    """Return a control group's CPU quota in cores; None if it has no quota."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        return quota_us / period_us if quota_us and quota_us > 0 and period_us else None


def peak_memory_bytes(device: torch.device) -> int:
    """Return a GPU allocator's peak in bytes, or on other devices the process's current resident set."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
