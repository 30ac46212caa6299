"""Resources: memory, disk and what the system allows a process, containers included."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from saekit.doctor.findings import GIB, RESOURCES, Finding, shown, size

LOW_MEMORY, MODEST_MEMORY = 1 * GIB, 4 * GIB
"""Less than the libraries and a tiny model take; less than a small model with all of its layers takes."""
LOW_DISK, MODEST_DISK = 1 * GIB, 10 * GIB
LOW_SHM = 1 * GIB
LOW_FILES = 1024
ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory(free: int, total: int, limit: int | None) -> Iterator[Finding]:
    """Memory that a run could have now.

    Args:
        free: Bytes, within the limit if there is one.
        total: The machine's.
        limit: What the container or the scheduler's job may use; None if that is all.
    """
    of = (
        size(total) if limit is None else f"the {size(limit)} that this container or job may use ({size(total)} in all)"
    )
    found = f"{size(free)} free of {of}"
    remedy = (
        "fewer --layers, a smaller --expansion-factor or --batch-size, --moments-dtype bf16; or a machine with more"
    )
    if free < LOW_MEMORY:
        yield Finding(RESOURCES, "memory", "problem", f"{found}: too little for the libraries and a model", remedy)
    elif free < MODEST_MEMORY:
        yield Finding(RESOURCES, "memory", "note", f"{found}: enough for small models only", remedy)
    else:
        yield Finding(RESOURCES, "memory", "ok", found)


def swap(total: int, used: int) -> Iterator[Finding]:
    """Swap, for the record: a run that needs it is too slow to wait for."""
    yield Finding(RESOURCES, "swap", "ok", f"{size(used)} of {size(total)} used" if total else "none")


def free_memory() -> tuple[int, int, int | None]:
    """What `memory` takes."""
    machine = psutil.virtual_memory()
    capped = memory_limit(machine.total)
    if capped is None:
        return machine.available, machine.total, None
    limit, left = capped
    return min(machine.available, left), machine.total, limit


def memory_limit(total: int, root: Path = ROOT, own: Path = OWN) -> tuple[int, int] | None:
    """The tightest limit of the control groups that this process is in, and what is left of it, in bytes.

    Args:
        total: The machine's memory: limits above it are none.
        root: Where control groups are mounted.
        own: The list of those that this process is in.
    """
    found = []
    for folder in _groups("memory", root, own):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        if limit is not None and limit < total:
            # What has been read from files counts as used, and is given up when it is needed.
            found.append((max(0, limit - used + _file_pages(folder / "memory.stat")), limit))
    left, limit = min(found, default=(0, None))
    return None if limit is None else (limit, left)


def usable_cores(root: Path = ROOT, own: Path = OWN) -> tuple[int, int]:
    """How many cores this process may use, and how many threads they run at once: affinity and quotas included."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu", root, own):
        share = _cpu_quota(folder)
        if share is not None:
            allowed = min(allowed, max(1, math.ceil(share)))
    return min(psutil.cpu_count(logical=False) or allowed, allowed), allowed


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in, of both versions, and of those above them."""
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
    """How many cores' time a control group may use; None if there is no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        return quota_us / period_us if quota_us and quota_us > 0 and period_us else None


def folder(area: str, name: str, path: Path, remedy: str) -> Iterator[Finding]:
    """A folder that has to be written to: that this works, and what is free on its disk.

    Args:
        area: Where the finding belongs.
        name: What it is called.
        path: The folder; it need not be there yet.
        remedy: What helps when it cannot be written, or its disk is full.
    """
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    where = shown(path)
    try:
        with tempfile.TemporaryFile(dir=there):  # asking for permissions would not notice a read-only disk
            pass
    except OSError as error:
        found = f"{where} cannot be written ({error.strerror or type(error).__name__})"
        yield Finding(area, name, "problem", found, remedy)
        return
    free = shutil.disk_usage(there).free
    found = f"{size(free)} free at {where}"
    if free < LOW_DISK:
        yield Finding(area, name, "problem", found, f"free some, or {remedy}")
    elif free < MODEST_DISK:
        yield Finding(area, name, "note", f"{found}: enough for small models only", f"free some, or {remedy}")
    else:
        yield Finding(area, name, "ok", found)


def shared_memory(gpus: int, path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Shared memory, which several GPUs talk through where they have no better way."""
    if not path.is_dir():
        return
    free = shutil.disk_usage(path).free
    if free < LOW_SHM:
        found = f"{size(free)} free: " + ("NCCL may need more" if gpus > 1 else "enough, unless GPUs train together")
        remedy = "start the container with --shm-size=1g (docker), or --ipc=host"
        yield Finding(RESOURCES, str(path), "problem" if gpus > 1 else "note", found, remedy)
    else:
        yield Finding(RESOURCES, str(path), "ok", f"{size(free)} free")


def open_files(soft: int, hard: int) -> Iterator[Finding]:
    """How many files a process may have open at once: data sets and checkpoints are many.

    Args:
        soft: The limit; negative if there is none.
        hard: What it can be raised to.
    """
    if 0 <= soft < LOW_FILES:
        most = 4096 if hard < 0 else min(hard, 4096)
        remedy = f"ulimit -n {most}" if most > soft else "ask the administrator to raise it (limits.conf)"
        yield Finding(RESOURCES, "open files", "note", f"at most {soft}, which large data sets exceed", remedy)
    else:
        yield Finding(RESOURCES, "open files", "ok", "no limit" if soft < 0 else f"at most {soft:,}")


def open_file_limits() -> tuple[int, int]:
    """What `open_files` takes; -1 where the system has no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return -1, -1
    return resource.getrlimit(resource.RLIMIT_NOFILE)
