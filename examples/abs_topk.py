"""AbsTopK: a selection of the k latents of largest magnitude, with their signs (arXiv 2510.00404). A plug-in.

One latent then represents a direction and its opposite. Train with

    saekit train MODEL DATASET --plugin abs_topk.py --activation abs_topk

and name the same file to `saekit eval`, `inspect`, `report` and `train --resume`.
"""

import torch

from saekit.registry import SELECTIONS
from saekit.sae.selection import Selection


@SELECTIONS.register("abs_topk")
class AbsTopK(Selection):
    """`z = a` for the k latents with the largest `|a|`, otherwise 0, where `a = W_enc (x − b_dec) + b_enc`, no ReLU."""

    name = "abs_topk"

    def encode(self, x_ND, W_enc_MD, b_enc_M, centre_D, kernels):
        """Return the k largest of `ReLU(a)` and `ReLU(−a)`: the kernels' TopK over a dictionary and its negative."""
        both = torch.cat([W_enc_MD, -W_enc_MD]), torch.cat([b_enc_M, -b_enc_M])
        sizes_NK, indices_NK = kernels.encode_topk(x_ND, *both, self.k, centre_D=centre_D)
        opposite = indices_NK >= self.num_latents
        return torch.where(opposite, -sizes_NK, sizes_NK), indices_NK - opposite * self.num_latents

    def fired(self, acts):
        """Return whether each value counts as a firing: values of either sign do."""
        return acts != 0
