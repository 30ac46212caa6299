"""GroupMax: the largest latent of each of k groups, as in sparsify."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from saekit.sae.selection.base import Selection
from saekit.sae.selection.topk import TopK


class GroupMax(TopK):
    """Splits the latents, in order, into k groups of M / k, and makes the largest of each group active."""

    name: ClassVar[str] = "groupmax"
    multi_topk: ClassVar[bool] = False

    @classmethod
    def check(cls, k: int, num_latents: int) -> None:
        """Check that the latents can be split into k groups of equal size."""
        super().check(k, num_latents)
        if num_latents % k:
            raise ValueError(f"groupmax needs k groups of equal size: {num_latents} latents are not a multiple of {k}")

    @property
    def parts(self) -> int:
        """Return k: each part of the dictionary has one active latent."""
        return self.k

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Raise an error: SAELens has no such architecture."""
        return Selection.to_saelens(self)
