"""One writer per run: a lock that ends with its process, that works between machines, and that says who holds it.

Two things make the lock of a run's folder:

- `flock` on the folder. The kernel gives it up when the process ends, however it ends. Between machines it may mean
  nothing (NFS with `local_lock`) or not be there (Lustre without `flock`), so it alone is believed only on a disk of
  this machine.
- The lease, `RUN/.lock`: host, process and time, in a file whose time of change a thread renews. On any other file
  system it keeps others out until its process has ended, as far as that can be seen from here, or until it has not
  been renewed for `EXPIRES` seconds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from saekit.errors import UserError
from saekit.runs.layout import LOCK_FILE, unfinished_locks
from saekit.runs.lease import EXPIRES, UNKNOWN, Writer, read_lease, renewed_at, write_lease

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RENEWS = 10.0
"""Seconds between two renewals of a lease."""
SETTLES = 1.0
"""Seconds after which a process that has written its lease looks whether another has done so at the same time."""
ASKS = 0.5
"""Seconds between two attempts of a process that waits for another one to end."""
LOCAL_DISKS = {"apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfs", "jfs"}
LOCAL_DISKS |= {"overlay", "ramfs", "tmpfs", "vfat", "xfs", "zfs"}
"""File systems of one machine, where `flock` can be trusted."""


class InUse(Exception):  # noqa: N818  # it begins a wait, or becomes a UserError
    """Another process has the lock; `age` is of its lease, in seconds, if that is what keeps others out."""

    def __init__(self, writer: Writer | None, age: float | None = None) -> None:
        writer = writer or UNKNOWN
        left = "" if age is None or writer.is_here() else f"{EXPIRES - age:.0f} seconds"
        super().__init__(f"{writer} (if that process is gone, its lock expires in {left})" if left else str(writer))


class RunLock:
    """The lock of a run's folder, in the hands of this process: see `hold`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writer = Writer.here()
        self.thread = threading.get_ident()
        self._lease = path / LOCK_FILE
        self._folder: int | None = None
        """The file descriptor that has the flock."""
        self._made: list[Path] = []
        """Folders that were made for it, the innermost first."""
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="run-lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock; the run's folder is made if it is not there.

        Raises:
            InUse: If another process has it.
            OSError: If the folder cannot be made or written in.
        """
        try:
            while not self._try():
                pass  # the folder has just been deleted, or replaced
        except BaseException:
            self._let_go()
            raise
        _held[self.path] = self
        self._renewing.start()

    def release(self) -> None:
        """Give the lock back, with the folders that were made for it if nothing is in them."""
        if self.writer.pid != os.getpid():  # a copy of the process that has the lock
            return
        self._ended.set()
        self._renewing.join()
        del _held[self.path]
        self._let_go()

    def renew(self) -> bool:
        """Renew the lease; False if another process has taken the folder over, because this one seemed dead."""
        try:
            writer = read_lease(self._lease)
            if writer is None or writer == UNKNOWN:  # somebody has deleted or spoilt it
                write_lease(self._lease, self.writer)
            elif writer != self.writer:
                return False
            os.utime(self._lease)
        except OSError:  # the next renewal may succeed; if the disk is gone, the next save says so
            pass
        return True

    def drop(self) -> None:
        """Close the folder, which gives up the flock unless a copy of this process has the folder open, too."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def _try(self) -> bool:
        self._made = [each for each in (self.path, *self.path.parents) if not each.exists()] or self._made
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._folder = os.open(self.path, os.O_RDONLY)
            locked = flock(self._folder)
            if locked is False:
                raise InUse(self._who())
            if os.path.samestat(os.fstat(self._folder), os.stat(self.path)):
                self._claim(alone=bool(locked) and is_local_disk(self.path))
                return True
        except FileNotFoundError:
            pass
        self.drop()
        return False

    def _claim(self, alone: bool) -> None:
        """Write the lease; `alone` says that no other process can be about to, and that one that is there is void."""
        fresh = self._lease.with_name(f"{LOCK_FILE}.{self.writer.token}")
        write_lease(fresh, self.writer)
        try:
            # Both times are of the file system's clock: those of two machines may differ.
            now = renewed_at(fresh)
            before = None if alone else read_lease(self._lease)
            if before is not None and before.may_live(age := now - renewed_at(self._lease)):
                raise InUse(before, age)
            os.replace(fresh, self._lease)
        finally:
            fresh.unlink(missing_ok=True)
        if not alone:
            time.sleep(SETTLES)
            if (after := read_lease(self._lease)) != self.writer:
                raise InUse(after)
        for left in unfinished_locks(self.path):
            with suppress(OSError):  # its process may be about to take it away
                if now - renewed_at(left) > EXPIRES:
                    left.unlink()

    def _who(self) -> Writer | None:
        """Return the writer that has the flock. It takes a moment from that to its lease."""
        until = time.monotonic() + SETTLES
        while time.monotonic() < until:
            writer = read_lease(self._lease)
            if writer is not None and writer.may_live(0.0):
                return writer
            time.sleep(SETTLES / 20)
        return None

    def _renew(self) -> None:
        while not self._ended.wait(RENEWS):
            if not self.renew():
                return

    def _let_go(self) -> None:
        with suppress(OSError):
            if read_lease(self._lease) == self.writer:
                self._lease.unlink()
        for each in self._made:
            with suppress(OSError):  # something is in it by now
                each.rmdir()
        self.drop()


_held: dict[Path, RunLock] = {}


def _drop_all() -> None:
    for lock in _held.values():
        lock.drop()
    _held.clear()


# A copy of this process, such as a worker that tokenizes, would keep the flock of one that was killed.
if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_drop_all)


@contextmanager
def hold(run_dir: Path, patience: float = 0.0, say: Callable[[str], None] = lambda message: None) -> Iterator[RunLock]:
    """Hold the lock of a run's folder: no other process writes in it inside this context.

    A thread that holds it already may hold it again. A folder that was made for the lock is deleted at the end if
    nothing is in it.

    Args:
        run_dir: The run's folder.
        patience: Seconds to wait for another process to give the lock back.
        say: Told that it waits, and for whom.

    Raises:
        UserError: If another process has the lock, or the folder cannot be made or written in.
    """
    path = run_dir.resolve()
    if (held := _held.get(path)) is not None and held.thread == threading.get_ident():
        yield held
        return
    lock = _acquired(run_dir, path, patience, say)
    try:
        yield lock
    finally:
        lock.release()


def _acquired(run_dir: Path, path: Path, patience: float, say: Callable[[str], None]) -> RunLock:
    until, waits = time.monotonic() + patience, False
    while True:
        lock = RunLock(path)
        try:
            lock.acquire()
            return lock
        except InUse as other:
            if time.monotonic() >= until:
                waited = f" (waited for {patience:g} seconds, --grace)" if waits else ""
                raise UserError(
                    f"the run folder {run_dir} is in use: {other}{waited}; wait until it ends, stop it, or choose "
                    "another --run-name"
                ) from None
            if not waits:
                say(f"Waiting for the run folder {run_dir}, for up to {patience:g} seconds (--grace): {other}")
            waits = True
            time.sleep(ASKS)
        except OSError as error:
            if path.exists() and not path.is_dir():
                raise UserError(f"the run folder {run_dir} is a file: see --save-dir and --run-name") from None
            raise UserError(
                f"the run folder {run_dir} cannot be created or written to ({error.strerror}): see --save-dir"
            ) from error


def flock(descriptor: int) -> bool | None:
    """Lock an open folder: whether it is locked now, or None if the file system, or the system, has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # NFS, for one, locks only what is open for writing
        return None
    return True


def is_local_disk(path: Path) -> bool:
    """Tell whether a folder is on a file system of this machine, as far as that can be told."""
    mounts = [each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)]
    # Of two at one place, the later one covers the other.
    return bool(mounts) and max(reversed(mounts), key=lambda each: len(each.mountpoint)).fstype in LOCAL_DISKS
