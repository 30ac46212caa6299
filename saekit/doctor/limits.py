"""Checks of resources: memory, disk, and the system's limits for a process, also in containers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from saekit.doctor.findings import GIB, RESOURCES, Finding, shown
from saekit.units import size

LOW_MEMORY, MODEST_MEMORY = 1 * GIB, 4 * GIB
"""Free bytes below which a tiny model does not fit, and below which a small model with all layers does not."""
LOW_DISK, MODEST_DISK = 1 * GIB, 10 * GIB
"""Free bytes on a disk below which there is a problem, and below which there is a note."""
LOW_SHM = 1 * GIB
"""Free bytes of shared memory below which NCCL may fail."""
LOW_FILES = 1024
"""Open files below which large data sets may fail."""


def memory(free: int, total: int, limit: int | None) -> Iterator[Finding]:
    """Check the memory that a run could use now.

    Args:
        free: Free bytes, within the limit if there is one.
        total: Bytes of the machine.
        limit: Bytes that the container or the scheduler's job may use; None without a limit.
    """
    of = (
        size(total)
        if limit is None
        else f"the {size(limit)} that this container or job may use (of {size(total)} in total)"
    )
    found = f"{size(free)} free of {of}"
    remedy = (
        "use fewer --layers, a smaller --expansion-factor or --batch-size, --moments-dtype bf16, or a larger machine"
    )
    if free < LOW_MEMORY:
        yield Finding(RESOURCES, "memory", "problem", f"{found}: too little for the libraries and a model", remedy)
    elif free < MODEST_MEMORY:
        yield Finding(RESOURCES, "memory", "note", f"{found}: enough for small models only", remedy)
    else:
        yield Finding(RESOURCES, "memory", "ok", found)


def swap(total: int, used: int) -> Iterator[Finding]:
    """Report swap. A run that needs it is too slow to be useful."""
    yield Finding(RESOURCES, "swap", "ok", f"{size(used)} of {size(total)} used" if total else "none")


def folder(area: str, name: str, path: Path, remedy: str) -> Iterator[Finding]:
    """Check that a folder can be written to and that its disk has free space.

    Args:
        area: The area of the finding.
        name: The name of the finding.
        path: The folder. It need not exist yet.
        remedy: What to do if it cannot be written or its disk is full.
    """
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    where = shown(path)
    try:
        with tempfile.TemporaryFile(dir=there):  # permissions alone would not show a read-only disk
            pass
    except OSError as error:
        found = f"{where} cannot be written ({error.strerror or type(error).__name__})"
        yield Finding(area, name, "problem", found, remedy)
        return
    free = shutil.disk_usage(there).free
    found = f"{size(free)} free at {where}"
    if free < LOW_DISK:
        yield Finding(area, name, "problem", found, f"free some space, or {remedy}")
    elif free < MODEST_DISK:
        yield Finding(area, name, "note", f"{found}: enough for small models only", f"free some space, or {remedy}")
    else:
        yield Finding(area, name, "ok", found)


def shared_memory(gpus: int, path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check shared memory, which several GPUs use to communicate if they have no direct link."""
    if not path.is_dir():
        return
    free = shutil.disk_usage(path).free
    if free < LOW_SHM:
        found = f"{size(free)} free: " + ("NCCL may need more" if gpus > 1 else "enough unless several GPUs train")
        remedy = "start the container with --shm-size=1g (docker), or --ipc=host"
        yield Finding(RESOURCES, str(path), "problem" if gpus > 1 else "note", found, remedy)
    else:
        yield Finding(RESOURCES, str(path), "ok", f"{size(free)} free")


def open_files(soft: int, hard: int) -> Iterator[Finding]:
    """Check the number of files that a process may have open, since data sets and checkpoints have many files.

    Args:
        soft: The current limit; negative for no limit.
        hard: The largest limit that a user may set; negative for no limit.
    """
    if 0 <= soft < LOW_FILES:
        most = 4096 if hard < 0 else min(hard, 4096)
        remedy = f"ulimit -n {most}" if most > soft else "ask the administrator to raise it (limits.conf)"
        yield Finding(RESOURCES, "open files", "note", f"at most {soft}, which large data sets exceed", remedy)
    else:
        yield Finding(RESOURCES, "open files", "ok", "no limit" if soft < 0 else f"at most {soft:,}")


def open_file_limits() -> tuple[int, int]:
    """Return the arguments for `open_files`; -1 if the system has no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return -1, -1
    return resource.getrlimit(resource.RLIMIT_NOFILE)
