"""TopK: each token's k largest latents (Gao et al. 2024, arXiv 2406.04093, section 2.3)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from saekit.sae.kernels import Kernels
from saekit.sae.kernels.eager import keep_above
from saekit.sae.selection.base import Selection

MULTI = 4
"""Multi-TopK's second code is this many times as wide (Gao et al. 2024, section 5.4)."""


class TopK(Selection):
    """`TopK(ReLU(W_enc (x − b_dec) + b_enc))`: k of M latents are active, largest first.

    The kinds that choose the largest latents in other ways inherit from it: they set `parts` or `threshold`, which the
    fused kernels know.
    """

    name: ClassVar[str] = "topk"
    multi_topk: ClassVar[bool] = True
    threshold: Tensor | None = None
    """A 0-dimensional tensor: smaller values are zero. None leaves all as they are."""

    @property
    def parts(self) -> int:
        """In how many equal parts of the dictionary the latents are chosen."""
        return 1

    def encode(
        self, x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, centre_D: Tensor | None, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """Choose each token's largest latents, with a backward pass over these only."""
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
        """Encode and decode in one, so that the pairs (latent, token) are sorted once for all weight gradients."""
        inputs = (x_ND, W_enc_MD, b_enc_M, W_dec_MD, centre_D, self.max_active)
        if prefixes:
            return kernels.autoencode_nested(*inputs, prefixes, self.threshold, self.parts)
        return kernels.autoencode(*inputs, self.threshold, self.parts)

    def wider(self) -> Selection:
        """Return the 4k largest."""
        return TopK(min(MULTI * self.k, self.num_latents), self.num_latents)

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`topk`. Unless told not to, it compares latents multiplied by the norms of their decoder rows."""
        return {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False}, {}
