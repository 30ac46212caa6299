"""Numbers between the host and a device that works through a queue, without waiting for the whole queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; the copy waits its turn there, not here."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def read_later(value: Tensor) -> Callable[[], list[Any]]:
    """Start to bring a tensor to the host.

    Returns:
        What gives its numbers. It waits until they are there, not for anything that is enqueued in between.
    """
    host = value.to("cpu", non_blocking=True)  # from a GPU into pinned memory
    arrived = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def read() -> list[Any]:
        if arrived is not None:
            arrived.synchronize()
        return host.tolist()

    return read
