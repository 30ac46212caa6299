"""GroupMax: the largest latent of each of k groups, as sparsify has it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from saekit.sae.selection.base import Selection
from saekit.sae.selection.topk import TopK


class GroupMax(TopK):
    """The latents are k groups of M / k, in their order, and the largest of each group is active."""

    name: ClassVar[str] = "groupmax"
    multi_topk: ClassVar[bool] = False

    @classmethod
    def check(cls, k: int, num_latents: int) -> None:
        """Check that the latents can be divided into k groups of one size."""
        super().check(k, num_latents)
        if num_latents % k:
            raise ValueError(f"groupmax makes k groups of equal size: {num_latents} latents are no multiple of {k}")

    @property
    def parts(self) -> int:
        """One for each latent that is kept."""
        return self.k

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Refuse: nothing there is like it."""
        return Selection.to_saelens(self)
