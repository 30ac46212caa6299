"""How a training process asks the operating system for memory."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`."""
MMAP_FROM = 32 * 2**20
"""The most that glibc allows."""
NEVER = 2**31 - 1


def keep_memory() -> None:
    """Ask for large pages, and keep what was freed for the next step instead of handing it back.

    Every step makes and frees the same tensors. A page that is handed back comes again by a page fault and full of
    zeros, which cost up to a third of a step on a CPU (docs/performance.md). Torch reads its setting once, before the
    first large tensor. Where the C library is another than glibc, only torch's setting is made.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
        mallopt(M_TRIM_THRESHOLD, NEVER)
