"""One process that owns every layer: the null object among the placements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from saekit.placement.local import LocalBank


class Single(LocalBank):
    """Everything on one device; routing and reducing are the identity. Implements `Placement`."""

    name = "single"
    rank = 0
    world_size = 1

    def route(self, acts: dict[str, Tensor], last: bool) -> Iterator[tuple[str, Tensor]]:
        """See `Placement.route`."""
        for hookpoint in list(acts):
            yield hookpoint, acts.pop(hookpoint)

    def sum(self, value: Tensor) -> Tensor:
        """See `Placement.sum`."""
        return value

    def share(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Placement.share`."""
        return counts

    def gather(self, value: Any) -> list[Any]:
        """See `Placement.gather`."""
        return [value]

    def first_to_fail(self) -> bool:
        """See `Placement.first_to_fail`."""
        return True

    def close(self) -> None:
        """See `Placement.close`."""
