"""Measures what a run uses of the machine."""

from __future__ import annotations

import psutil
import torch


def peak_memory_bytes(device: torch.device) -> int:
    """On a GPU the most that its allocator has held, elsewhere the process's resident set now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
