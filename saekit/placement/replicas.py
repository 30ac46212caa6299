"""Sends replicas of a unit from one rank to the others, and compares replicas by a checksum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from saekit.sae import Sae

BLOCK = 2**22
"""Elements that are summed at a time: as int64 and with temporaries, 64 MiB on the device."""
GOLDEN_RATIO = -7046029254386353131
"""2⁶⁴ divided by the golden ratio, as a signed number. Its multiples spread evenly over int64 (Fibonacci hashing)."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""The integer type for elements of this many bytes. Half of int64's bits stay unused, so factors lose no bits."""


def tensors_of(sae: Sae) -> list[Tensor]:
    """Return the tensors that replicas share: the weights, and the selection's state, such as a threshold."""
    return [parameter.detach() for parameter in sae.parameters()] + list(sae.selection.state().values())


def send(tensors: Iterable[Tensor], source: int) -> None:
    """Overwrite tensors on all ranks by those of rank `source`. Collective."""
    for tensor in tensors:
        dist.broadcast(tensor, src=source)


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Return a checksum of all bits of the tensors: an int64 scalar on their device.

    The checksum sums integers, so it does not depend on the order in which a device adds. Each element has its own
    factor, so changes of several elements do not cancel.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    longest = min(BLOCK, 2 * max(tensor.numel() for tensor in tensors))
    factors = torch.arange(1, longest + 1, device=total.device).mul_(GOLDEN_RATIO).bitwise_or_(1)
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(BITS[tensor.element_size()])
        for part in bits.split(BLOCK):
            total.mul_(GOLDEN_RATIO).add_((part.long() * factors[: len(part)]).sum())
    return total


def strays(checksums: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return, by unit, the ranks whose replica differs from that of most ranks, or from rank 0's if there is a tie.

    Args:
        checksums: For each unit, one checksum per rank.
    """
    found = {}
    for name, of_ranks in checksums.items():
        usual = Counter(of_ranks).most_common(1)[0][0]
        if different := [rank for rank, each in enumerate(of_ranks) if each != usual]:
            found[name] = different
    return found
