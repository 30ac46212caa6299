"""Requests to stop: by Ctrl-C, or by a scheduler's signal.

After one Ctrl-C, a SIGTERM or a SIGUSR1 (SLURM sends these), the run finishes the step, saves and stops. A second
Ctrl-C stops it at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NO_STOP, BY_SCHEDULER, BY_USER = 0, 1, 2
"""Codes for who requested a stop. The highest code over all ranks decides."""

SCHEDULER_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Windows has no SIGUSR1."""


class Interruption:
    """Holds the request to stop, if the user or a scheduler has made one."""

    def __init__(self) -> None:
        self.request = NO_STOP


@contextmanager
def graceful_interrupt(grace: float, last_words: Callable[[str], None]) -> Iterator[Interruption]:
    """Turn the first Ctrl-C and a scheduler's signals into a request; a second Ctrl-C interrupts as usual.

    Python allows signal handlers in the main thread only. In other threads, signals make no request.

    Args:
        grace: Seconds that the context has to end after a scheduler's signal. If it does not, the process ends.
        last_words: Called with the reason just before the process ends.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        if interruption.request == BY_USER:
            raise KeyboardInterrupt
        interruption.request = BY_USER

    def on_scheduler(_signal: int, _frame: FrameType | None) -> None:
        interruption.request = max(interruption.request, BY_SCHEDULER)

    handlers = {signal.SIGINT: on_interrupt, **dict.fromkeys(SCHEDULER_SIGNALS, on_scheduler)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with _deadline(grace, last_words):
            yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deadline(grace: float, last_words: Callable[[str], None]) -> Iterator[None]:
    """End the process `grace` seconds after a scheduler's signal, even if it hangs in a library.

    Python runs signal handlers between two bytecodes of the main thread, which may be waiting for another rank inside
    a library. The wakeup socket receives the signals' numbers at once, and a separate thread reads them.
    """
    numbers, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while number := numbers.recv(1):
            if number[0] in SCHEDULER_SIGNALS:
                break
        else:
            return
        end = time.monotonic() + grace
        try:
            numbers.settimeout(grace)
            while numbers.recv(1):  # further signals; empty once the context has ended
                numbers.settimeout(max(0.001, end - time.monotonic()))
        except TimeoutError:
            name = signal.Signals(number[0]).name
            last_words(f"{name} arrived, and the step was not finished and saved within --grace {grace:g} seconds")
            os._exit(128 + number[0])

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        watcher.join()
        numbers.close()
