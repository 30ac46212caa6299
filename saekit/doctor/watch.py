"""Ends ranks if they wait for each other too long or one has failed, and reports the stage of each rank."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from saekit.errors import SILENCE

FAILED = "saekit/doctor/failed"
"""The key in the store that a failed rank sets."""
TOO_LATE = "late"
"""The value of that key if a rank's time limit has passed."""
LEAVING = "tear-down"
"""The last stage, in which the store may end before a rank does."""
POLL = 0.5
"""Seconds between two looks at the other ranks' state."""


class Place(NamedTuple):
    """The progress of a rank."""

    stage: str
    """The stage that it is in."""
    error: str | None
    """The error that has ended it; None if there is none."""


Report = Callable[[bool, list[Place | None]], None]


class Watch:
    """Watches the checks of a rank, in a thread that collectives do not block.

    Ranks share their progress through a store. If the limit has passed or a rank has failed, rank 0 reports, and all
    processes end at once, because a rank that waits for a GPU runs no Python code.

    Args:
        rank: This rank.
        ranks: The number of ranks.
        limit_s: Seconds that all checks together may take.
        report: Called on rank 0 if the checks end early, with whether the limit has passed and the progress of each
            rank (None for a rank that has never written to the store).
    """

    def __init__(self, rank: int, ranks: int, limit_s: float, report: Report) -> None:
        self._rank, self._ranks, self._report = rank, ranks, report
        self._until = time.monotonic() + limit_s
        self._store: Any = None
        self._here = Place("start", None)
        self._done = threading.Event()
        self._ending = threading.Lock()
        threading.Thread(target=self._run, daemon=True, name="saekit-watch").start()

    def use(self, store: Any) -> None:
        """Share progress through this store from now on. The connection must not be used by anything else."""
        if store is not None:
            self._store = store
            self._tell()

    def at(self, stage: str) -> None:
        """Record the stage that this rank begins now."""
        self._here = Place(stage, None)
        self._tell()

    def fail(self, error: str) -> None:
        """Record this rank's error, and end the process after rank 0 has reported it."""
        self._here = Place(self._here.stage, error)
        self._tell()
        if self._store is not None:
            self._store.set(FAILED, str(self._rank))
        self._end(late=False)

    def done(self) -> None:
        """Stop watching."""
        self._done.set()

    def _tell(self) -> None:
        if self._store is not None:
            self._store.set(f"saekit/doctor/{self._rank}", json.dumps(self._here))

    def _places(self) -> list[Place | None]:
        """Return the progress of each rank; None for a rank that has never written to the store."""
        places: list[Place | None] = [None] * self._ranks
        for rank in range(self._ranks):
            key = f"saekit/doctor/{rank}"
            if self._store is not None and self._store.check([key]):
                places[rank] = Place(*json.loads(self._store.get(key)))
        places[self._rank] = self._here
        return places

    def _run(self) -> None:
        while not self._done.wait(POLL):
            late = time.monotonic() > self._until
            failed = False
            try:
                if self._store is not None and late:
                    self._store.set(FAILED, TOO_LATE)  # by the rank whose limit passes first
                if self._store is not None and self._store.check([FAILED]):
                    failed, late = True, self._store.get(FAILED) == TOO_LATE.encode()
            except RuntimeError:  # the rank or launcher that hosts the store has ended
                failed = self._here.stage != LEAVING
            if late or failed:
                self._end(late=late)

    def _end(self, *, late: bool) -> None:
        with self._ending:  # the first of two threads; the other one waits here until the process ends
            try:
                self._report_or_wait(late)
                sys.stdout.flush()
            except Exception:  # noqa: BLE001  # the process must end
                traceback.print_exc()
            finally:
                os._exit(1)

    def _report_or_wait(self, late: bool) -> None:
        if self._rank == 0:
            time.sleep(POLL)  # lets other failing ranks record their errors, too
            try:
                places = self._places()
            except RuntimeError:
                places = [self._here, *[None] * (self._ranks - 1)]
            self._report(late, places)
        elif self._store is None:  # rank 0 cannot know
            reason = self._here.error or "the time limit has passed"
            sys.stderr.write(f"Error: rank {self._rank} at {self._here.stage}: {reason}\n")
            sys.stderr.flush()
        else:
            time.sleep(SILENCE)  # otherwise the launcher would stop rank 0 before it has reported
