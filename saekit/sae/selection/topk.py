"""TopK: each token's k largest latents (Gao et al. 2024, arXiv 2406.04093, section 2.3)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from saekit.sae.kernels import Kernels
from saekit.sae.kernels.eager import keep_above
from saekit.sae.selection.base import Selection

MULTI = 4
"""The width of Multi-TopK's second code, as a multiple of k (Gao et al. 2024, section 5.4)."""


class TopK(Selection):
    """Makes the k largest of M latents active, largest first: `TopK(ReLU(W_enc (x − b_dec) + b_enc))`.

    Other ways to choose the largest latents inherit from it. They set `parts` or `threshold`, which the fused kernels
    support.
    """

    name: ClassVar[str] = "topk"
    multi_topk: ClassVar[bool] = True
    threshold: Tensor | None = None
    """A 0-dimensional tensor. Values up to the threshold become zero. None leaves all values as they are."""

    @property
    def parts(self) -> int:
        """Return the number of equal parts of the dictionary, each of which has `max_active / parts` active latents."""
        return 1

    def encode(
        self, x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, centre_D: Tensor | None, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """Choose each token's largest latents. The backward pass covers only these."""
        acts_NK, indices_NK = kernels.encode_topk(
            x_ND, W_enc_MD, b_enc_M, self.max_active, centre_D=centre_D, parts=self.parts
        )
        return keep_above(acts_NK, self.threshold), indices_NK

    def autoencode(
        self,
        x_ND: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        W_dec_MD: Tensor,
        centre_D: Tensor | None,
        kernels: Kernels,
        prefixes: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode and decode together, so that one sort of the pairs (latent, token) serves all weight gradients."""
        inputs = (x_ND, W_enc_MD, b_enc_M, W_dec_MD, centre_D, self.max_active)
        if prefixes:
            return kernels.autoencode_nested(*inputs, prefixes, self.threshold, self.parts)
        return kernels.autoencode(*inputs, self.threshold, self.parts)

    def wider(self) -> Selection:
        """Return TopK with 4k latents."""
        return TopK(min(MULTI * self.k, self.num_latents), self.num_latents)

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return `topk`. By default SAELens' `topk` scales latents by their decoder norms before it compares them."""
        return {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False}, {}
