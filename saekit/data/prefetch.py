"""Reading the next step's tokens while this one is computed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor


def read_ahead(read: Callable[[int], list[Tensor]], start: int, stop: int) -> Generator[tuple[int, list[Tensor]]]:
    """Each step's number, from `start` up to but not including `stop`, with its batches; the next ones are being read.

    What a step reads depends on its number alone, so reading early changes nothing. An error in `read` is raised when
    its step comes. Close the iterator (or use it up) to end its thread.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokens") as worker:
        coming = worker.submit(read, start) if start < stop else None
        for step in range(start, stop):
            assert coming is not None, "submitted in the round before"
            batches = coming.result()
            if step + 1 < stop:
                coming = worker.submit(read, step + 1)
            yield step, batches
