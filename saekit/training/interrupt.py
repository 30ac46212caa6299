"""Requests to stop: by Ctrl-C, or by a scheduler that wants the machine back.

Ctrl-C once, SIGTERM and SIGUSR1 (what SLURM sends): finish the step, save, stop. Ctrl-C twice: stop now.
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

NOT_ASKED, BY_SCHEDULER, BY_USER = 0, 1, 2
"""Codes for who asked for a stop; over several ranks the highest counts."""

SCHEDULER_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Windows has no SIGUSR1."""


class Interruption:
    """Knows whether the user or a scheduler has asked the run to stop."""

    def __init__(self) -> None:
        self.request = NOT_ASKED


@contextmanager
def graceful_interrupt(grace: float, last_words: Callable[[str], None]) -> Iterator[Interruption]:
    """Turn the first Ctrl-C and a scheduler's signals into a request; a second Ctrl-C interrupts as usual.

    Outside the main thread, where Python allows no signal handlers, nothing is requested.

    Args:
        grace: Seconds after a scheduler's signal within which the context must end; if it does not, the process does.
        last_words: Told why, just before that.
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
    """End the process `grace` seconds after a scheduler's signal, whatever it is doing.

    Python's handlers run between two bytecodes of the main thread, which can be waiting for another rank inside a
    library. The numbers of signals arrive at this socket at once, where a thread of its own reads them.
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
            while numbers.recv(1):  # more signals; nothing when the context has ended
                numbers.settimeout(max(0.001, end - time.monotonic()))
        except TimeoutError:
            name = signal.Signals(number[0]).name
            last_words(f"{name} came, and the step was not done and saved within --grace {grace:g} seconds")
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
