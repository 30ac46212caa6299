"""When a rank fails, all ranks end. Only the first error is shown, and no rank waits for one that is gone.

Under NCCL a rank waits for others in its device's queue. No Python signal handler runs there, and nothing tells the
rank that another one has failed. Therefore a thread of each rank polls the launcher's store and ends the process.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from saekit.errors import SILENCE, Interrupted, UserError
from saekit.placement.base import Placement

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

POLL_SECONDS = 0.5
"""Seconds between two looks at the store for a failed rank."""
NOTICE_SECONDS = 2.0
"""Seconds for which the first failed rank waits until all others have noticed; less than `SILENCE`."""
CLEANUP_SECONDS = 15.0
"""Seconds that the failed rank has to show its error and exit by itself. The others exit after `SILENCE`."""
GONE = ("gloo", "remote process")
"""Words in the errors of gloo and NCCL when another rank has ended."""


class FailureWatch:
    """Watches for a failed rank, and ends this process if there is one.

    The ranks tell each other through the launcher's store. They have met there, so every machine can reach it. (A file
    in the run's folder could be left from an earlier start, and a network file system may show it minutes later.)

    Args:
        store: A connection to the store.
        start: An id of this start. A launcher that restarts the ranks keeps its store.
        ranks: The number of ranks.
    """

    def __init__(self, store: Store, start: str, ranks: int) -> None:
        self.store, self._ranks = store, ranks
        self._key, self._heard = f"saekit/{start}/failures", f"saekit/{start}/heard"
        self._seen = False
        self._claimed: bool | None = None
        self._leaving = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)

    def begin(self) -> None:
        """Start to watch, until `end`."""
        if not self._thread.is_alive():
            self._thread.start()

    def claim(self) -> bool:
        """Tell all ranks that this one has failed, and return whether it is the first. Its process ends soon after."""
        if self._claimed is None:
            if self._thread.is_alive():
                # At exit, Python would otherwise tear down the process groups and wait for ranks that do not answer.
                atexit.register(leave_at_once, 1)
            self._claimed = not self._seen  # the best guess, in case the store is gone or out of reach
            asking = threading.Thread(target=self._tell, name="claim", daemon=True)
            asking.start()
            asking.join(SILENCE)
        return self._claimed

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the store ends with the rank or the launcher that hosts it
            self._claimed = self.store.add(self._key, 1) == 1
            # The launcher that hosts the store may end as soon as this rank has ended.
            until = time.monotonic() + NOTICE_SECONDS
            while self._claimed and self.store.add(self._heard, 0) < self._ranks - 1 and time.monotonic() < until:
                time.sleep(0.05)

    def closing(self, error: BaseException) -> None:
        """Start a timer that shows the error and ends the process if closing (a tracker, a lock) takes too long."""

        def give_up() -> None:
            if self._claimed is None:
                if self.claim():
                    os.write(2, f"\nError: {error}\n".encode())
                os._exit(1)

        if not self._thread.is_alive():
            return
        timer = threading.Timer(CLEANUP_SECONDS, give_up)
        timer.daemon = True
        timer.start()

    def leave(self) -> None:
        """Note that the run is complete. From now on the store may go away, because other ranks end."""
        self._leaving = True

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        failed = lost = False
        while not (failed or lost or self._ended.wait(POLL_SECONDS)):
            try:
                failed = self._seen = self.store.check([self._key])
                if failed and not self._claimed:
                    self.store.add(self._heard, 1)
            except RuntimeError:
                lost = not (failed or self._leaving)
        if not (failed or lost) or self._ended.wait(SILENCE):
            return
        if lost or self._claimed is not None:  # give the main thread time to show its error
            self._ended.wait(CLEANUP_SECONDS - SILENCE)
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h")  # a live view hides the cursor
        if lost and self._claimed is None:
            os.write(2, b"\nError: the launcher of rank 0, or its machine, is gone: this rank ends\n")
        os._exit(1)


@contextmanager
def one_error(placement: Placement, way_on: Callable[[], str]) -> Iterator[None]:
    """End all ranks if one raises an error inside the context, and show only the first error.

    A launcher stops all ranks as soon as one has ended. Therefore the other ranks wait a moment, so that the first one
    can show its error, and then end without a message.

    Args:
        placement: The ranks.
        way_on: Says how to continue if another rank has ended without an error message.

    Raises:
        UserError: If another rank has ended without an error message.
    """
    placement.watch()
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        placement.first_to_fail()  # ends ranks on other machines, which have no terminal
        raise
    except Exception as error:
        if not placement.first_to_fail():
            time.sleep(SILENCE)
            leave_at_once(1)
        said = str(error).lower()
        if placement.world_size > 1 and isinstance(error, RuntimeError) and any(word in said for word in GONE):
            raise UserError(
                "another rank of this run has ended without an error message (killed, out of memory, or its machine is "
                f"gone); {way_on()}"
            ) from error
        raise


def leave_at_once(code: int) -> NoReturn:
    """Flush the streams and end the process without any other cleanup."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the stream is closed, or a pipe without a reader
            stream.flush()
    os._exit(code)
