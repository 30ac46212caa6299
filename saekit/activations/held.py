"""Activations that are kept for a while: on the device, in the machine's memory, or in a file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.activations.hookpoints import Hookpoint
from saekit.activations.live import to_device
from saekit.errors import UserError
from saekit.machine import free_memory
from saekit.units import size

SHARE = 0.2
"""Of a device's memory, up to which `auto` keeps activations there."""
HOST_SHARE = 0.5
"""Of the machine's available memory."""


class Held:
    """Rows of activations by hookpoint, `[rows, D]` each, in memory that is used again and again.

    Args:
        tensors: By hookpoint `[rows, D]`: where they are kept.
        device: Where they are made and used.
    """

    block: Any = None
    """Whose rows these are; for the caller."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._away = any(each.device != device for each in tensors.values())

    def put(self, name: str, start: int, acts_ND: Tensor, order_N: Tensor) -> None:
        """Keep rows of activations, in an order, from row `start` on."""
        rows_ND = self._tensors[name][start : start + len(order_N)]
        if self._away:
            rows_ND.copy_(acts_ND.index_select(0, order_N), non_blocking=True)
        else:
            torch.index_select(acts_ND, 0, order_N, out=rows_ND)

    def finish(self) -> None:
        """Wait until everything is there."""
        if self._device.type == "cuda" and self._away:
            torch.cuda.synchronize(self._device)

    def take(self, name: str, spans: Sequence[slice]) -> Tensor:
        """Return a copy of some rows, on the device."""
        rows_ND = torch.cat([self._tensors[name][span] for span in spans])
        return to_device(rows_ND, self._device) if self._away else rows_ND

    def close(self) -> None:
        """Give the memory back."""
        self._tensors.clear()


def hold(
    where: str,
    hookpoints: Sequence[Hookpoint],
    dtypes: Mapping[str, torch.dtype],
    rows: int,
    device: torch.device,
    folder: Path,
) -> Held:
    """Make room for activations.

    Args:
        where: `device`, `host`, `disk`, or `auto`, which takes the first of them that has room.
        hookpoints: Of which.
        dtypes: Of the activations, by hookpoint.
        rows: At most.
        device: Where they are made and used.
        folder: For the file, which has no name there, so that it is gone when the process is, however that ends.

    Raises:
        UserError: If there is not that much room.
    """
    sizes = {each.name: rows * each.width * dtypes[each.name].itemsize for each in hookpoints}
    if where == "auto":
        where = _room(sum(sizes.values()), device)
    if where == "disk":
        tensors = _in_file(sizes, folder)
        found = {each.name: tensors[each.name].view(dtypes[each.name]).view(rows, each.width) for each in hookpoints}
    else:
        on_gpu = device.type == "cuda"
        place: dict[str, Any] = {"pin_memory": True} if on_gpu and where == "host" else {"device": device}
        try:
            found = {each.name: torch.empty(rows, each.width, dtype=dtypes[each.name], **place) for each in hookpoints}
        except RuntimeError as error:  # torch has no class of its own for a CPU's memory
            needed = size(sum(sizes.values()))
            raise UserError(f"--mix needs {needed} on the {where}, which are not there: mix fewer steps") from error
    return Held(found, device)


def stays_on_device(where: str, needed: int, memory: int) -> bool:
    """Tell whether activations are kept on a GPU.

    Args:
        where: See `hold`.
        needed: Bytes.
        memory: The GPU's, in bytes.
    """
    return where == "device" or (where == "auto" and needed <= SHARE * memory)


def _room(needed: int, device: torch.device) -> str:
    on_gpu = device.type == "cuda"
    if on_gpu and stays_on_device("auto", needed, torch.cuda.get_device_properties(device).total_memory):
        return "device"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    in_memory = "host" if on_gpu else "device"
    return in_memory if needed * ranks <= HOST_SHARE * free_memory()[0] else "disk"


def _in_file(sizes: dict[str, int], folder: Path) -> dict[str, Tensor]:
    """Return uint8 tensors in a file without a name."""
    total = sum(sizes.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, total)
            room = torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(total,)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        needed = size(total)
        raise UserError(
            f"--mix-in disk cannot make a file of {needed} in {folder}: {error.strerror}; mix fewer steps"
        ) from error
    found, start = {}, 0
    for name, length in sizes.items():
        found[name] = room[start : start + length]
        start += length
    return found
