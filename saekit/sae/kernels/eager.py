"""The oracle: encode and decode as the formulas say them, differentiated by autograd. Slow and obvious."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def encode_topk(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest values of `ReLU(x Wᵀ + b)` per token, largest first.

    Args:
        x_ND: `[N, D]`, one row per token; the decoder's bias is already subtracted.
        W_MD: `[M, D]`, one row per latent.
        b_M: `[M]`.
        k: How many latents to keep, at most `M`.

    Returns:
        Values `[N, K]` (zero where fewer than `k` latents are positive) and their latents' numbers `[N, K]`, int64.
    """
    scores_NM = F.relu(F.linear(x_ND, W_MD, b_M))
    acts_NK, indices_NK = scores_NM.topk(k, dim=-1, sorted=True)
    return acts_NK, indices_NK


def decode(acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
    """The sum of `acts[n, k] * W[indices[n, k]]` over `k`: `[N, D]`, without the decoder's bias."""
    return (acts_NK.unsqueeze(-1) * W_MD[indices_NK]).sum(dim=1)
