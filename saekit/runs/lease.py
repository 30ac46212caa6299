"""A lease: which process writes in a run's folder, and whether it still may."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

EXPIRES = 60.0
"""Seconds after its last renewal in which a lease expires."""


@dataclass(frozen=True)
class Writer:
    """A process that writes in a run's folder: the content of a lease."""

    host: str
    machine: str
    """What tells apart machines, starts of one machine and containers, which may all have the same name."""
    pid: int
    started: str
    """When the process did, which tells it from a later one of the same pid."""
    since: float
    """When it took the lease; Unix time, in seconds."""
    token: str
    """What no other lease has."""

    @classmethod
    def here(cls) -> Writer:
        """Return this process, about to take a lease."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid) or "", time.time(), uuid.uuid4().hex)

    def may_live(self, age: float) -> bool:
        """Tell whether the process may still be writing, given the seconds since it renewed its lease."""
        if age > EXPIRES:
            return False
        return not self.is_here() or _started(self.pid) == self.started

    def is_here(self) -> bool:
        """Tell whether it is, or was, a process whose end can be seen from here."""
        return self.machine == _machine()

    def __str__(self) -> str:
        if self == UNKNOWN:
            return "another process is training in it"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} has been training in it since {since}"


UNKNOWN = Writer("", "", 0, "", 0.0, "")
"""A writer whose lease cannot be read, or is not written yet."""


def write_lease(file: Path, writer: Writer) -> None:
    """Write a lease.

    Raises:
        OSError: If it cannot be written.
    """
    file.write_text(json.dumps(asdict(writer)) + "\n", encoding="utf-8")


def read_lease(file: Path) -> Writer | None:
    """Return the writer that a lease names, `UNKNOWN` if the file is no lease, None if there is none."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        host, machine, started, token = (str(said[name]) for name in ("host", "machine", "started", "token"))
        time.localtime(said["since"])  # refuses what is no time
        return Writer(host, machine, int(said["pid"]), started, float(said["since"]), token)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, OverflowError):
        return UNKNOWN


def renewed_at(file: Path) -> float:
    """Return when a lease was renewed, in seconds by the clock of the file system.

    The file is opened for that: a network file system may remember an old time of one that it does not open.
    """
    with file.open("rb") as stream:
        return os.fstat(stream.fileno()).st_mtime


def _machine() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):  # only Linux has these
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """Tell when a process started, in a unit of this machine's; None if it has ended."""
    try:  # in clock ticks since the machine's start, which do not change when its clock is set
        state, *numbers = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state in "ZX" else numbers[18]  # a zombie only waits to be noticed
    except OSError:
        with suppress(psutil.Error):
            return str(psutil.Process(pid).create_time())
        return None
