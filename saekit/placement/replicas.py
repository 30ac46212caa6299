"""Replicas of a unit on several ranks: sent from one of them, and compared by a checksum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from saekit.sae import Sae

BLOCK = 2**22
"""Elements of a tensor that are added up at a time: 64 MiB of int64 on the device."""
ODD = -7046029254386353131
"""2⁶⁴ divided by the golden ratio, as a signed number: its multiples are spread evenly."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""The type in which elements of this many bytes are read: half of int64's bits stay unused, so a factor loses none."""


def tensors_of(sae: Sae) -> list[Tensor]:
    """Return what replicas have in common: the weights, and what the selection moves, such as a threshold."""
    return [parameter.detach() for parameter in sae.parameters()] + list(sae.selection.state().values())


def send(tensors: Iterable[Tensor], source: int) -> None:
    """Overwrite tensors on all ranks by those of one. Collective."""
    for tensor in tensors:
        dist.broadcast(tensor, src=source)


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Return a number that differs if any bit of the tensors does: a scalar, int64, on their device.

    Whole numbers are added up, so it does not depend on the order in which a device adds. Each element counts with a
    factor of its own, so changes of several elements do not cancel.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    longest = min(BLOCK, 2 * max(tensor.numel() for tensor in tensors))
    factors = torch.arange(1, longest + 1, device=total.device).mul_(ODD).bitwise_or_(1)
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(BITS[tensor.element_size()])
        for part in bits.split(BLOCK):
            total.mul_(ODD).add_((part.long() * factors[: len(part)]).sum())
    return total


def strays(checksums: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return the ranks whose replica is not the one that most ranks have, in doubt the first rank's.

    Args:
        checksums: Of each unit, one of each rank.
    """
    found = {}
    for name, of_ranks in checksums.items():
        usual = Counter(of_ranks).most_common(1)[0][0]
        if different := [rank for rank, each in enumerate(of_ranks) if each != usual]:
            found[name] = different
    return found
