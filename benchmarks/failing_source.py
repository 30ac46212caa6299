"""A plug-in for two_nodes.py: a live source where one rank raises and others wait where no signal reaches them.

The environment says which: FAILS is a rank, STUCK ranks with spaces between. NOTES is the folder for what is noted.
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
"""The micro-batch at which it happens, counted from the start of the process; the first is the calibration's."""


def wait_for_ever() -> None:
    """Wait without Python's lock, as in NCCL: no signal handler runs."""
    mutex = ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)


@SOURCES.register("failing")
def open_failing(cfg: Any, placement: Any, say: Any, have: Any) -> Any:
    """Open the live source and let it fail."""
    source = SOURCES.get("live")(cfg, placement, say, have)
    notes, batches = Path(os.environ["NOTES"]), 0
    (notes / f"pid{placement.rank}").write_text(str(os.getpid()))
    run = source._run

    def run_or_not(batch: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == BATCH and placement.rank == int(os.environ["FAILS"]):
            atexit.register(wait_for_ever)  # as communicators that are taken down
            time.sleep(2)  # the others wait by now
            (notes / "raised").write_text(str(time.time()))
            raise UserError(f"rank {placement.rank} has failed")
        if batches == BATCH and str(placement.rank) in os.environ["STUCK"].split():
            wait_for_ever()
        return run(batch)

    source._run = run_or_not
    return source
