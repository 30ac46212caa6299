"""Buffers that hold activations for some steps: on the device, in the machine's memory, or in a file."""

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
"""The largest share of a GPU's memory that `auto` uses for activations."""
HOST_SHARE = 0.5
"""The largest share of the machine's available memory that `auto` uses for activations."""


class Held:
    """A reusable buffer for rows of activations, `[rows, D]` for each hookpoint.

    Args:
        tensors: The buffers, `[rows, D]` by hookpoint.
        device: Where activations are computed and used.
    """

    block: Any = None
    """The block that the rows belong to. Set by the caller."""

    def __init__(self, tensors: dict[str, Tensor], device: torch.device) -> None:
        self._tensors, self._device = tensors, device
        self._away = any(each.device != device for each in tensors.values())

    def put(self, name: str, start: int, acts_ND: Tensor, order_N: Tensor) -> None:
        """Store the rows `order_N` of activations, from row `start` of the buffer on."""
        rows_ND = self._tensors[name][start : start + len(order_N)]
        if self._away:
            rows_ND.copy_(acts_ND.index_select(0, order_N), non_blocking=True)
        else:
            torch.index_select(acts_ND, 0, order_N, out=rows_ND)

    def finish(self) -> None:
        """Wait until all rows are stored."""
        if self._device.type == "cuda" and self._away:
            torch.cuda.synchronize(self._device)

    def take(self, name: str, spans: Sequence[slice]) -> Tensor:
        """Return a copy of some rows, on the device."""
        rows_ND = torch.cat([self._tensors[name][span] for span in spans])
        return to_device(rows_ND, self._device) if self._away else rows_ND

    def close(self) -> None:
        """Free the memory."""
        self._tensors.clear()


def hold(
    where: str,
    hookpoints: Sequence[Hookpoint],
    dtypes: Mapping[str, torch.dtype],
    rows: int,
    device: torch.device,
    folder: Path,
) -> Held:
    """Allocate a buffer for activations.

    Args:
        where: `device`, `host`, `disk`, or `auto` for the first of them with enough room.
        hookpoints: The hookpoints of the activations.
        dtypes: The activations' types, by hookpoint.
        rows: The largest number of rows.
        device: Where activations are computed and used.
        folder: The folder for a file. The file has no name, so it disappears with the process, however that ends.

    Raises:
        UserError: If there is not enough room.
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
        except RuntimeError as error:  # torch has no separate error for CPU memory
            needed = size(sum(sizes.values()))
            raise UserError(f"--mix needs {needed} on the {where}, but there is less: mix fewer steps") from error
    return Held(found, device)


def stays_on_device(where: str, needed: int, memory: int) -> bool:
    """Return whether activations are held on a GPU.

    Args:
        where: See `hold`.
        needed: The activations' size in bytes.
        memory: The GPU's memory in bytes.
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
    """Allocate uint8 tensors in a file without a name."""
    total = sum(sizes.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # macOS has none, and finds a full disk only when it writes
                os.posix_fallocate(file.fileno(), 0, total)
            room = torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(total,)))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        needed = size(total)
        raise UserError(
            f"--mix-in disk cannot create a file of {needed} in {folder} ({error.strerror}): mix fewer steps"
        ) from error
    found, start = {}, 0
    for name, length in sizes.items():
        found[name] = room[start : start + length]
        start += length
    return found
