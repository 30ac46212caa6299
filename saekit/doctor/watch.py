"""Ends ranks that wait for each other for too long, or of which one has failed, and says where each of them is."""

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
"""The key in the store that a rank sets which cannot go on."""
TOO_LATE = "late"
"""Its value where a rank's limit on time has passed."""
LEAVING = "tear-down"
"""The last stage, in which the store may be gone before a rank is."""
POLL = 0.5
"""Seconds between two looks at what the other ranks say."""


class Place(NamedTuple):
    """Where a rank is."""

    stage: str
    error: str | None


Report = Callable[[bool, list[Place | None]], None]


class Watch:
    """Watches the trial of a rank, in a thread that no collective holds up.

    Ranks tell each other through a store where they are. When the limit has passed, or one has failed, rank 0 reports
    and all leave: at once, as a rank that waits for a GPU runs no Python.

    Args:
        rank: This one's number.
        ranks: How many there are.
        limit_s: Seconds that all may take together.
        report: Told by rank 0 why it ends early: whether the limit has passed, and where each rank is (None where a
            rank has not said anything).
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
        """Tell the other ranks through this store, a connection of its own, from now on."""
        if store is not None:
            self._store = store
            self._tell()

    def at(self, stage: str) -> None:
        """Say what this rank begins now."""
        self._here = Place(stage, None)
        self._tell()

    def fail(self, error: str) -> None:
        """Say that this rank cannot go on, and leave once rank 0 has reported it."""
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
        """Return where each rank is, as far as it has said so."""
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
                    self._store.set(FAILED, TOO_LATE)  # whichever rank's clock runs out first
                if self._store is not None and self._store.check([FAILED]):
                    failed, late = True, self._store.get(FAILED) == TOO_LATE.encode()
            except RuntimeError:  # the store is gone, with the rank or the launcher that had it
                failed = self._here.stage != LEAVING
            if late or failed:
                self._end(late=late)

    def _end(self, *, late: bool) -> None:
        with self._ending:  # one of the two threads; the other waits here until the process ends
            try:
                self._speak(late)
                sys.stdout.flush()
            except Exception:  # noqa: BLE001  # the process must end
                traceback.print_exc()
            finally:
                os._exit(1)

    def _speak(self, late: bool) -> None:
        if self._rank == 0:
            time.sleep(POLL)  # ranks that fail for the same reason say so, too
            try:
                places = self._places()
            except RuntimeError:
                places = [self._here, *[None] * (self._ranks - 1)]
            self._report(late, places)
        elif self._store is None:  # rank 0 cannot know
            reason = self._here.error or "the limit on time has passed"
            sys.stderr.write(f"Error: rank {self._rank} at {self._here.stage}: {reason}\n")
            sys.stderr.flush()
        else:
            time.sleep(SILENCE)  # else the launcher would stop rank 0 before it has spoken
