"""Resources: memory, disk and what the system allows a process, containers included."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from saekit.doctor.findings import GIB, RESOURCES, Finding, shown
from saekit.units import size

LOW_MEMORY, MODEST_MEMORY = 1 * GIB, 4 * GIB
"""Less than the libraries and a tiny model take; less than a small model with all of its layers takes."""
LOW_DISK, MODEST_DISK = 1 * GIB, 10 * GIB
LOW_SHM = 1 * GIB
LOW_FILES = 1024


def memory(free: int, total: int, limit: int | None) -> Iterator[Finding]:
    """Memory that a run could have now.

    Args:
        free: Bytes, within the limit if there is one.
        total: The machine's.
        limit: What the container or the scheduler's job may use; None if that is all.
    """
    of = (
        size(total)
        if limit is None
        else f"the {size(limit)} that this container or job may use (of {size(total)} in total)"
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


def folder(area: str, name: str, path: Path, remedy: str) -> Iterator[Finding]:
    """Check a folder that has to be written to: that this works, and what is free on its disk.

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
    """Check how many files a process may have open at once: data sets and checkpoints are many.

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
    """Read the argument of `open_files`; -1 if the system has no such limit."""
    try:
        import resource
    except ImportError:  # Windows
        return -1, -1
    return resource.getrlimit(resource.RLIMIT_NOFILE)
