"""Encode and decode at the cost of a k-sparse code plus one dense matmul, in the forward and the backward pass.

- The dense scores only *select*. If they are computed in low precision, they name 1.5 times as many candidates as
  wanted. The candidates' pre-activations are then computed from their rows in the parameters' precision, and the K
  largest are taken. Low precision can therefore drop a latent only if its error exceeds the distance to the last
  candidate.
- GroupMax chooses latents in equal parts of the dictionary. Low precision then names candidates in each part.
- Both weight gradients are sums over the N·K pairs (latent, token) of a scalar times a row:
  `dW[m] = Σ_{(n,k): indices[n,k]=m} c[n,k] · rows[n]`. One stable sort groups the pairs by latent for both. Each
  gradient is then a weighted sum of rows per group: N·K·D multiply-adds instead of the N·M·D of a dense product. The
  order of the sums is fixed, so every run gives the same result. The sums can be deferred to the optimizer
  (`row_sums`).

The computation is defined here once. Each backend provides `Ops`, the loops over memory that it consists of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saekit.sae.kernels.eager import keep_above
from saekit.sae.kernels.row_sums import RowSums, try_to_defer

LEAST_SPARE = 8
"""The least number of candidates beyond k."""
WORTH_FROM = 32
"""The least number of latents per candidate for which low precision saves time. Computing a candidate again takes 15 to
40 times as long as its share of a float32 matmul. AuxK, which selects many of few dead latents, therefore uses
float32."""


class Ops(Protocol):
    """The loops that a backend provides. They know nothing of gradients. `torch_ops` documents them in full."""

    def topk(
        self, x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, dtype: torch.dtype, in_order: bool, parts: int
    ) -> tuple[Tensor, Tensor]:
        """Return the k largest scores of each token and their latents, largest first if `in_order`.

        With several parts, return the k / parts largest of each, part by part. For int8, only the latents are valid.
        """

    def best_of(self, scores_NC: Tensor, latents_NC: Tensor, k: int, parts: int) -> tuple[Tensor, Tensor]:
        """Return the k largest of each token's C scores and their latents, largest first, part by part."""

    def gather_dot(self, x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
        """Compute the dot products of each token's row with the rows chosen for it."""

    def gather_sum(self, weights_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
        """Compute the weighted sum of the rows chosen for each token."""

    def segment_sum(self, weights_P: Tensor, tokens_P: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
        """Compute the weighted sum of the tokens' rows for each latent."""

    def sort_pairs(self, indices_NK: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sort the pairs (latent, token) by latent."""

    @property
    def adam_(self) -> Callable[..., None]:
        """Return a function that computes `eager.adam_` and also accepts a gradient of `RowSums`."""


class Sparse(NamedTuple):
    """Implements `Kernels` with one backend's `Ops`."""

    name: str
    ops: Ops
    select_dtype: torch.dtype | None = None
    """The type in which candidates are found. None is the parameters' own, in which latents are selected directly."""

    def encode_topk(
        self, x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, *, centre_D: Tensor | None = None, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Compute `eager.encode_topk`, with a backward pass over only the K chosen latents."""
        acts_NK, indices_NK, _ = self._encode(x_ND, W_MD, b_M, k, centre_D, parts)
        return acts_NK, indices_NK

    def decode(self, acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
        """Compute `eager.decode`, without an `[N, K, D]` tensor, with a backward pass over only the chosen rows."""
        return _Decode.apply(acts_NK, indices_NK, W_MD, _Pairs(indices_NK, W_MD.shape[0], self.ops), self.ops)

    def autoencode(
        self,
        x_ND: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        W_dec_MD: Tensor,
        centre_D: Tensor | None,
        k: int,
        threshold: Tensor | None = None,
        parts: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `eager.autoencode`, with one sort of the pairs for both weight gradients."""
        acts_NK, indices_NK, pairs = self._encode(x_ND, W_enc_MD, b_enc_M, k, centre_D, parts)
        acts_NK = keep_above(acts_NK, threshold)
        return _Decode.apply(acts_NK, indices_NK, W_dec_MD, pairs, self.ops), acts_NK, indices_NK

    def autoencode_nested(
        self,
        x_ND: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        W_dec_MD: Tensor,
        centre_D: Tensor | None,
        k: int,
        prefixes: tuple[int, ...],
        threshold: Tensor | None = None,
        parts: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `eager.autoencode_nested`, with weight gradients as cheap as those of `autoencode`."""
        acts_NK, indices_NK, pairs = self._encode(x_ND, W_enc_MD, b_enc_M, k, centre_D, parts)
        acts_NK = keep_above(acts_NK, threshold)
        rows_GND = _DecodeNested.apply(acts_NK, indices_NK, W_dec_MD, pairs, self.ops, prefixes)
        return rows_GND, acts_NK, indices_NK

    @property
    def adam_(self) -> Callable[..., None]:
        """Return a function that computes `eager.adam_` in one pass over memory, also for a gradient of `RowSums`."""
        return self.ops.adam_

    def sum_rows(self, sums: RowSums) -> Tensor:
        """Compute `RowSums.dense`."""
        return self.ops.segment_sum(*sums)

    def _encode(
        self, x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, centre_D: Tensor | None, parts: int
    ) -> tuple[Tensor, Tensor, _Pairs]:
        pairs = _Pairs(None, W_MD.shape[0], self.ops)
        select_dtype = self.select_dtype
        if select_dtype is None or not low_precision_pays(k, W_MD.shape[0], parts):
            select_dtype = W_MD.dtype
        acts_NK, indices_NK = _EncodeTopK.apply(x_ND, W_MD, b_M, centre_D, k, parts, pairs, self.ops, select_dtype)
        return acts_NK, indices_NK, pairs


def num_candidates(k: int, num_latents: int, parts: int = 1) -> int:
    """Return how many candidates low precision names for `k` latents: the same number in each part."""
    each = k // parts
    spare = max(each // 2, LEAST_SPARE // parts, 1)
    return min(each + spare, num_latents // parts) * parts


def low_precision_pays(k: int, num_latents: int, parts: int = 1) -> bool:
    """Return whether the candidates for `k` latents are few enough for low precision to save time."""
    return num_candidates(k, num_latents, parts) * WORTH_FROM <= num_latents


def least_latents(k: int) -> int:
    """Return the smallest number of latents for which `low_precision_pays`."""
    return (k + max(k // 2, LEAST_SPARE, 1)) * WORTH_FROM


class _Pairs:
    """The pairs (latent, token) of a k-sparse code. They are sorted by latent once, at the first sum over them."""

    def __init__(self, indices_NK: Tensor | None, num_latents: int, ops: Ops) -> None:
        self.indices_NK = indices_NK
        self.num_latents = num_latents
        self.ops = ops

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.indices_NK is not None, "encode sets them"
        return self.ops.sort_pairs(self.indices_NK, self.num_latents)

    def sum(self, coefficients_NK: Tensor, rows_ND: Tensor, shifts_NK: Tensor | None = None) -> Tensor:
        """Compute `out[m] = Σ_{(n,k): indices[n,k]=m} coefficients[n,k] · rows[n + shifts[n,k]]`, `[M, D]`."""
        return self.ops.segment_sum(*self._sums(coefficients_NK, rows_ND, shifts_NK))

    def gradient(
        self, W_MD: Tensor, coefficients_NK: Tensor, rows_ND: Tensor, shifts_NK: Tensor | None = None
    ) -> Tensor | None:
        """Compute the same sum as the gradient of a matrix. None if the gradient is deferred to the optimizer."""
        sums = self._sums(coefficients_NK, rows_ND, shifts_NK)
        return None if try_to_defer(W_MD, sums) else self.ops.segment_sum(*sums)

    def _sums(self, coefficients_NK: Tensor, rows_ND: Tensor, shifts_NK: Tensor | None) -> RowSums:
        order, tokens, starts_M = self._sorted
        if shifts_NK is not None:
            tokens = tokens + shifts_NK.flatten()[order]
        return RowSums(coefficients_NK.flatten()[order].to(rows_ND.dtype), tokens, starts_M, rows_ND)


class _EncodeTopK(torch.autograd.Function):
    """The top-k of a linear layer with ReLU. The gradient passes only where a chosen value is positive."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        W_MD: Tensor,
        b_M: Tensor,
        centre_D: Tensor | None,
        k: int,
        parts: int,
        pairs: _Pairs,
        ops: Ops,
        select_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        x_ND = x_ND if centre_D is None else x_ND - centre_D
        if select_dtype == W_MD.dtype:
            values_NK, indices_NK = ops.topk(x_ND, W_MD, b_M, k, select_dtype, True, parts)
        else:
            wanted = num_candidates(k, W_MD.shape[0], parts)
            _, candidates_NC = ops.topk(x_ND, W_MD, b_M, wanted, select_dtype, False, parts)
            exact_NC = ops.gather_dot(x_ND, W_MD, candidates_NC).add_(b_M[candidates_NC])
            values_NK, indices_NK = ops.best_of(exact_NC, candidates_NC, k, parts)
        # ReLU after the choice gives the same values as before it, but processes K instead of M numbers per token.
        acts_NK = values_NK.relu_()
        pairs.indices_NK = indices_NK
        ctx.save_for_backward(x_ND, W_MD, acts_NK, indices_NK)
        ctx.pairs, ctx.ops = pairs, ops
        ctx.mark_non_differentiable(indices_NK)
        return acts_NK, indices_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, W_MD, acts_NK, indices_NK = ctx.saved_tensors
        grad_NK = grad_NK * (acts_NK > 0)
        need_x, need_W, need_b, need_centre, *_ = ctx.needs_input_grad
        pairs, ops = ctx.pairs, ctx.ops
        dx_ND = ops.gather_sum(grad_NK, indices_NK, W_MD) if need_x else None
        dW_MD = pairs.gradient(W_MD, grad_NK, x_ND) if need_W else None
        db_M = None
        if need_b or need_centre:
            # Not `index_add_`, whose order of addition on a GPU varies.
            db_M = pairs.sum(grad_NK, x_ND.new_ones(x_ND.shape[0], 1)).squeeze(1)
        # Summing over tokens first makes the centre's gradient one matrix-vector product, without a gradient per token.
        dcentre_D = -(db_M @ W_MD) if need_centre else None
        return dx_ND, dW_MD, db_M if need_b else None, dcentre_D, None, None, None, None, None


class _Decode(torch.autograd.Function):
    """Computes each token's weighted sum of its chosen rows."""

    @staticmethod
    def forward(ctx: Any, acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor, pairs: _Pairs, ops: Ops) -> Tensor:
        ctx.save_for_backward(acts_NK, indices_NK, W_MD)
        ctx.pairs, ctx.ops = pairs, ops
        return ops.gather_sum(acts_NK, indices_NK, W_MD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        acts_NK, indices_NK, W_MD = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()  # the gradient of `sum` is an expanded scalar
        need_acts, _, need_W, *_ = ctx.needs_input_grad
        dacts_NK = ctx.ops.gather_dot(grad_ND, W_MD, indices_NK) if need_acts else None
        dW_MD = ctx.pairs.gradient(W_MD, acts_NK, grad_ND) if need_W else None
        return dacts_NK, None, dW_MD, None, None


class _DecodeNested(torch.autograd.Function):
    """Computes for each prefix of the dictionary the weighted sum of the chosen rows in it, `[G, N, D]`."""

    @staticmethod
    def forward(
        ctx: Any, acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor, pairs: _Pairs, ops: Ops, prefixes: tuple[int, ...]
    ) -> Tensor:
        # A latent's group is the first prefix that contains it. It contributes to this group and all later ones.
        # Compare with one prefix at a time: a tensor of prefixes would be copied to the device in every step.
        groups_NK = torch.zeros_like(indices_NK)
        for prefix in prefixes[:-1]:
            groups_NK += indices_NK >= prefix
        ctx.save_for_backward(acts_NK, indices_NK, W_MD, groups_NK)
        ctx.pairs, ctx.ops = pairs, ops
        parts = [ops.gather_sum(acts_NK * (groups_NK == group), indices_NK, W_MD) for group in range(len(prefixes))]
        return torch.stack(parts).cumsum_(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GND: Tensor) -> tuple[Tensor | None, ...]:
        acts_NK, indices_NK, W_MD, groups_NK = ctx.saved_tensors
        # The gradient for a latent of each group is the sum of the gradients of all sums that the latent is in.
        grads_GND = grad_GND.flip(0).cumsum_(0).flip(0)
        need_acts, _, need_W, *_ = ctx.needs_input_grad
        dacts_NK = dW_MD = None
        if need_acts:
            dacts_NK = torch.zeros_like(acts_NK)
            for group, grad_ND in enumerate(grads_GND):
                dots_NK = ctx.ops.gather_dot(grad_ND, W_MD, indices_NK)
                dacts_NK = torch.where(groups_NK == group, dots_NK, dacts_NK)
        if need_W:
            shifts_NK = groups_NK * grads_GND.shape[1]
            dW_MD = ctx.pairs.gradient(W_MD, acts_NK, grads_GND.flatten(0, 1), shifts_NK)
        return dacts_NK, None, dW_MD, None, None, None
