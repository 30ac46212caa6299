"""A plug-in for two_nodes.py: a live source in which one rank raises an error while others block all signal handlers.

Environment variables choose the ranks: FAILS is one rank, STUCK is a list of ranks separated by spaces. NOTES is the
folder for notes about what has happened.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import time
from pathlib import Path
from typing import Any

from saekit.errors import UserError
from saekit.registry import SOURCES

lock = ctypes.CDLL(None).pthread_mutex_lock
BATCH = 3
"""The micro-batch at which ranks fail or block, counted from the start of the process. The first is for calibration."""


def wait_for_ever() -> None:
    """Wait without holding Python's lock, as NCCL does, so that no signal handler runs."""
    mutex = ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)


@SOURCES.register("failing")
def open_failing(cfg: Any, placement: Any, say: Any, have: Any) -> Any:
    """Open the live source, and let it fail or block."""
    source = SOURCES.get("live")(cfg, placement, say, have)
    notes, batches = Path(os.environ["NOTES"]), 0
    (notes / f"pid{placement.rank}").write_text(str(os.getpid()))
    run = source._run

    def run_or_not(batch: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == BATCH and placement.rank == int(os.environ["FAILS"]):
            atexit.register(wait_for_ever)  # as communicators do when they are torn down
            time.sleep(2)  # until the others wait
            (notes / "raised").write_text(str(time.time()))
            raise UserError(f"rank {placement.rank} has failed")
        if batches == BATCH and str(placement.rank) in os.environ["STUCK"].split():
            wait_for_ever()
        return run(batch)

    source._run = run_or_not
    return source
