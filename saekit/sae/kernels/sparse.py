"""Encode and decode whose backward passes cost what a k-sparse code costs.

Both weight gradients are sums over the N·K pairs (latent, token) of a scalar times a row:
`dW[m] = Σ_{(n,k): indices[n,k]=m} c[n,k] · rows[n]`. One stable sort groups the pairs by latent, and then each
gradient is a weighted sum of rows per group: an embedding bag with latents as bags and tokens as the table. That is
N·K·D multiply-adds instead of the N·M·D of a dense product, and the order of summation is fixed, so that the result
is the same on every run (tested on the CPU; on a GPU not tried yet). Only autograd's treatment differs from `eager`;
the values are the same formulas.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def encode_topk(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `eager.encode_topk`, with a backward pass over the K chosen latents only."""
    acts_NK, indices_NK = _EncodeTopK.apply(x_ND, W_MD, b_M, k)
    return acts_NK, indices_NK


def decode(acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
    """As `eager.decode`, without an `[N, K, D]` tensor and with a backward pass over the chosen rows only."""
    # The bag gives the value and the gradient of the activations; the weight's gradient is attached separately,
    # because the bag's own is an unsorted scatter.
    out_ND = _gather_sum(acts_NK, indices_NK, W_MD.detach())
    if W_MD.requires_grad and torch.is_grad_enabled():
        return _AttachRowGradient.apply(out_ND, W_MD, acts_NK.detach(), indices_NK)
    return out_ND


def _gather_sum(weights_NK: Tensor, indices_NK: Tensor, rows_MD: Tensor) -> Tensor:
    """`Σ_k weights[n, k] · rows[indices[n, k]]`: `[N, D]`."""
    if indices_NK.numel() == 0:  # an empty chunk of tokens, or k = 0: the bag refuses both
        return rows_MD.new_zeros(indices_NK.shape[0], rows_MD.shape[1]) + weights_NK.sum()
    return F.embedding_bag(indices_NK, rows_MD, per_sample_weights=weights_NK, mode="sum")


class _ByLatent:
    """The pairs (latent, token) of a k-sparse code, sorted by latent once for all sums over them."""

    def __init__(self, indices_NK: Tensor, num_latents: int) -> None:
        latents, self.order = indices_NK.flatten().sort(stable=True)
        counts_M = torch.zeros(num_latents, dtype=torch.int64, device=latents.device)
        counts_M.scatter_add_(0, latents, torch.ones_like(latents))
        self.starts_M = counts_M.cumsum(0) - counts_M
        self.tokens = self.order.div(max(1, indices_NK.shape[1]), rounding_mode="floor")

    def sum(self, coefficients_NK: Tensor, rows_ND: Tensor) -> Tensor:
        """`out[m] = Σ_{(n,k): indices[n,k]=m} coefficients[n,k] · rows[n]`: `[M, D]`."""
        if coefficients_NK.numel() == 0:
            return rows_ND.new_zeros(len(self.starts_M), rows_ND.shape[1])
        weights = coefficients_NK.flatten()[self.order].to(rows_ND.dtype)
        return F.embedding_bag(self.tokens, rows_ND, self.starts_M, per_sample_weights=weights, mode="sum")


class _EncodeTopK(torch.autograd.Function):
    """Top-k of a ReLU-linear layer. The gradient passes where a chosen value is positive: that is ReLU's mask."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores_NM = F.linear(x_ND, W_MD, b_M)
        # ReLU after the choice gives the same values as before it, and touches K instead of M numbers per token.
        values_NK, indices_NK = scores_NM.topk(k, dim=-1, sorted=True)
        acts_NK = values_NK.relu_()
        ctx.save_for_backward(x_ND, W_MD, acts_NK, indices_NK)
        ctx.mark_non_differentiable(indices_NK)
        return acts_NK, indices_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, W_MD, acts_NK, indices_NK = ctx.saved_tensors
        grad_NK = grad_NK * (acts_NK > 0)
        need_x, need_W, need_b, _ = ctx.needs_input_grad
        dx_ND = _gather_sum(grad_NK, indices_NK, W_MD) if need_x else None
        pairs = _ByLatent(indices_NK, W_MD.shape[0])
        dW_MD = pairs.sum(grad_NK, x_ND) if need_W else None
        # Not `index_add_`, which adds in any order on a GPU.
        db_M = pairs.sum(grad_NK, x_ND.new_ones(x_ND.shape[0], 1)).squeeze(1) if need_b else None
        return dx_ND, dW_MD, db_M, None


class _AttachRowGradient(torch.autograd.Function):
    """The identity on `out`, which adds the gradient of the rows that `out` was made of."""

    @staticmethod
    def forward(ctx: Any, out_ND: Tensor, W_MD: Tensor, acts_NK: Tensor, indices_NK: Tensor) -> Tensor:
        ctx.save_for_backward(acts_NK, indices_NK)
        ctx.num_latents = W_MD.shape[0]
        return out_ND.view_as(out_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        acts_NK, indices_NK = ctx.saved_tensors
        return grad_ND, _ByLatent(indices_NK, ctx.num_latents).sum(acts_NK, grad_ND), None, None
