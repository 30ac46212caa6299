"""Measures what a process can use on this machine, within its container's limits: memory, cores, libraries."""

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
"""Where control groups are mounted, and the list of those that this process is in."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`."""
MMAP_FROM = 32 * 2**20
"""The most that glibc allows."""
NEVER = 2**31 - 1


def library_versions() -> dict[str, str]:
    """Return the versions of what a result can depend on."""
    return {"python": platform.python_version(), "saekit": __version__, **_installed()}


@cache
def _installed() -> Mapping[str, str]:
    """Read each package's metadata once: every save states the versions, and one package's take milliseconds."""
    found = {}
    for name in ("torch", "transformers", "datasets", "accelerate", "safetensors", "deepspeed", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return MappingProxyType(found)


def cpu_model(listing: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's name where the system tells it, else its architecture. Two kinds of CPU can share a name."""
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", listing.read_text("utf-8", errors="replace"), re.MULTILINE)
    except OSError:  # not Linux
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Return the folder for what saekit can make again: `$XDG_CACHE_HOME/saekit`, by default below `~/.cache`.

    Where that cannot be written, it is a folder of this process only.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "saekit"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # the second: nobody's home
        pass
    return _folder_of_this_process()


@cache
def _folder_of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="saekit-"))


def usable_memory(root: Path = GROUPS, own: Path = OWN_GROUPS) -> int:
    """Return how many bytes this process may have: the machine's memory, or less in a container or a job.

    Args:
        root: Where control groups are mounted.
        own: The list of those that this process is in.
    """
    total = psutil.virtual_memory().total
    return min((limit for _, limit in _memory_limits(total, root, own)), default=total)


def free_memory() -> tuple[int, int, int | None]:
    """Return the bytes that are free for this process, the machine's, and the limit that it runs under, if any."""
    machine = psutil.virtual_memory()
    capped = memory_limit(machine.total)
    if capped is None:
        return machine.available, machine.total, None
    limit, left = capped
    return min(machine.available, left), machine.total, limit


def memory_limit(total: int, root: Path = GROUPS, own: Path = OWN_GROUPS) -> tuple[int, int] | None:
    """Return the limit that this process meets first, and what is left of it, in bytes; None if there is none.

    Args:
        total: The machine's memory: limits above it are none.
        root: Where control groups are mounted.
        own: The list of those that this process is in.
    """
    left, limit = min(_memory_limits(total, root, own), default=(0, None))
    return None if limit is None else (limit, left)


def usable_cores(root: Path = GROUPS, own: Path = OWN_GROUPS) -> tuple[int, int]:
    """Return how many cores this process may use, and how many threads they run at once.

    Affinity and the quotas of control groups are taken into account.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu", root, own):
        share = _cpu_quota(folder)
        if share is not None:
            allowed = min(allowed, max(1, math.ceil(share)))
    return min(psutil.cpu_count(logical=False) or allowed, allowed), allowed


def keep_memory() -> None:
    """Ask for large pages, and keep what was freed for the next step instead of handing it back.

    Every step makes and frees the same tensors. A page that is handed back comes again by a page fault and full of
    zeros, which cost up to a third of a step on a CPU (docs/performance-kernels.md). Torch reads its setting once,
    before the first large tensor. Where the C library is another than glibc, only torch's setting is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def _memory_limits(total: int, root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Yield what is left of each control group's limit, and the limit: a process is bound by all that it is in."""
    for folder in _groups("memory", root, own):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        if limit is not None and limit < total:
            # What has been read from files counts as used, and is given up when it is needed.
            yield max(0, limit - used + _file_pages(folder / "memory.stat")), limit


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that this process is in, of both versions, and of those above them."""
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
    except (OSError, ValueError):  # there is none, or it says `max`
        return None


def _file_pages(stat: Path) -> int:
    try:
        lines = dict(line.split() for line in stat.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0
    return int(lines.get("total_inactive_file") or lines.get("inactive_file") or 0)


def _cpu_quota(folder: Path) -> float | None:
    """Return how many cores' time a control group may use; None if there is no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        return quota_us / period_us if quota_us and quota_us > 0 and period_us else None


def peak_memory_bytes(device: torch.device) -> int:
    """On a GPU the most that its allocator has held, elsewhere the process's resident set now."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
