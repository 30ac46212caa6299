"""When a rank fails, all ranks end: the first error is shown, and no rank waits for one that is gone.

Under NCCL a rank waits for others in its device's queue, where no signal handler of Python's runs, and nothing there
tells it that another rank has failed. So a thread of each rank asks the launcher's store, and ends the process.
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

ASKS = 0.5
"""Seconds between two questions whether a rank has failed."""
HEARD = 2.0
"""Seconds for which the first rank that fails waits until all others know; less than `SILENCE`."""
CLEANS_UP = 15.0
"""Seconds that the rank with the error has to show it and to leave by itself; the others leave after `SILENCE`."""
GONE = ("gloo", "remote process")
"""What the errors of gloo and NCCL say if another rank has ended."""


class FailureWatch:
    """Knows whether a rank has failed, and ends this process if one has.

    The ranks tell each other in the launcher's store: they have met there, so every machine reaches it. (A file in the
    run's folder could be of an earlier start, and a network file system may show it minutes later.)

    Args:
        store: A connection to the store.
        start: What no other start of these ranks has: a launcher that starts them again keeps its store.
        ranks: How many there are.
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
        """Watch from now on, until `end`."""
        if not self._thread.is_alive():
            self._thread.start()

    def claim(self) -> bool:
        """Tell all ranks that this one has failed, and return whether it is the first. It leaves soon, in any case."""
        if self._claimed is None:
            if self._thread.is_alive():
                # Else Python would take the process groups down at its end, and wait for those who will not answer.
                atexit.register(leave_at_once, 1)
            self._claimed = not self._seen  # unless the store says otherwise: it may be gone, or out of reach
            asking = threading.Thread(target=self._tell, name="claim", daemon=True)
            asking.start()
            asking.join(SILENCE)
        return self._claimed

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the store is gone with the rank or the launcher that had it
            self._claimed = self.store.add(self._key, 1) == 1
            # The launcher that has the store may end as soon as this rank has.
            until = time.monotonic() + HEARD
            while self._claimed and self.store.add(self._heard, 0) < self._ranks - 1 and time.monotonic() < until:
                time.sleep(0.05)

    def closing(self, error: BaseException) -> None:
        """Show an error and leave if what is being closed on its way up (a tracker, a lock) takes too long."""

        def give_up() -> None:
            if self._claimed is None:
                if self.claim():
                    os.write(2, f"\nError: {error}\n".encode())
                os._exit(1)

        if not self._thread.is_alive():
            return
        timer = threading.Timer(CLEANS_UP, give_up)
        timer.daemon = True
        timer.start()

    def leave(self) -> None:
        """All is done: from now on the store may go, because ranks that have nothing to wait for end."""
        self._leaving = True

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        failed = lost = False
        while not (failed or lost or self._ended.wait(ASKS)):
            try:
                failed = self._seen = self.store.check([self._key])
                if failed and not self._claimed:
                    self.store.add(self._heard, 1)
            except RuntimeError:
                lost = not (failed or self._leaving)
        if not (failed or lost) or self._ended.wait(SILENCE):
            return
        if lost or self._claimed is not None:  # the main thread may have an error, and show it
            self._ended.wait(CLEANS_UP - SILENCE)
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h")  # a live view hides the cursor
        if lost and self._claimed is None:
            os.write(2, b"\nError: the launcher of rank 0, or its machine, is gone: this rank ends\n")
        os._exit(1)


@contextmanager
def one_error(placement: Placement, way_on: Callable[[], str]) -> Iterator[None]:
    """What all ranks do together; an error on one rank ends them all. Only the first is shown, by the rank that had it.

    The others wait a moment, so that the launcher, which stops all ranks when the first has ended, does not stop that
    one before it has spoken, and leave in silence.

    Args:
        placement: The ranks.
        way_on: What can be done if another rank has ended without an error message.
    """
    placement.watch()
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        placement.first_to_fail()  # ranks on other machines have no terminal
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
    """End the process without taking anything down."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
            stream.flush()
    os._exit(code)
