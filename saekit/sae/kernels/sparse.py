"""Encode and decode whose forward and backward passes cost what a k-sparse code costs, plus one dense matmul.

- The dense scores only *select*. In low precision, if asked, they name half as many candidates again as are wanted,
  whose pre-activations are computed from their rows in the parameters' precision; the K largest of those are taken. So
  low precision can cost a latent its place only where its error is larger than the distance to the last candidate.
- Latents may be chosen in equal parts of the dictionary, as GroupMax does; low precision then names candidates in each.
- Both weight gradients are sums over the N·K pairs (latent, token) of a scalar times a row:
  `dW[m] = Σ_{(n,k): indices[n,k]=m} c[n,k] · rows[n]`. One stable sort groups the pairs by latent for both, and each
  gradient is a weighted sum of rows per group: N·K·D multiply-adds instead of the N·M·D of a dense product, in an
  order that is fixed, so that the result is the same on every run. They may be left to the optimizer (`row_sums`).

What is computed is written here once; `Ops` are the loops over memory that it is made of, one set per backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saekit.sae.kernels.eager import keep_above
from saekit.sae.kernels.row_sums import RowSums, left_to_the_step

LEAST_SPARE = 8
"""Candidates beyond k that low precision names at least."""
WORTH_FROM = 32
"""Latents per candidate from which low precision pays: to compute a candidate again costs 15 to 40 times what its share
of a float32 matmul does. AuxK's many latents out of few dead ones are selected in float32."""


class Ops(Protocol):
    """The loops that a backend provides; none knows of gradients. `torch_ops` says in full what they compute."""

    def topk(
        self, x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, dtype: torch.dtype, in_order: bool, parts: int
    ) -> tuple[Tensor, Tensor]:
        """Return the k largest scores of each token and their latents, largest first if they are to be in order.

        Of each of `parts` equal parts of the latents k / parts, part by part. For int8 only the latents mean anything.
        """

    def best_of(self, scores_NC: Tensor, latents_NC: Tensor, k: int, parts: int) -> tuple[Tensor, Tensor]:
        """Return the k largest of each token's few scores, and their latents, largest first; part by part."""

    def gather_dot(self, x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
        """Return each token's row times the rows chosen for it."""

    def gather_sum(self, weights_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
        """Return the weighted sum of the rows chosen for each token."""

    def segment_sum(self, weights_P: Tensor, tokens_P: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
        """Return the weighted sum of the tokens' rows for each latent."""

    def sort_pairs(self, indices_NK: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pairs (latent, token), sorted by latent."""

    @property
    def adam_(self) -> Callable[..., None]:
        """One step of Adam, with projection and renormalization where rows have norm 1.

        As `eager.adam_`, and from a gradient that is `RowSums`, too.
        """


class Sparse(NamedTuple):
    """The kernels over one set of `Ops`. Implements `Kernels`."""

    name: str
    ops: Ops
    select_dtype: torch.dtype | None = None
    """In what precision candidates are found; None: the parameters' own, which needs none."""

    def encode_topk(
        self, x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, *, centre_D: Tensor | None = None, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """As `eager.encode_topk`, with a backward pass over the K chosen latents only."""
        acts_NK, indices_NK, _ = self._encode(x_ND, W_MD, b_M, k, centre_D, parts)
        return acts_NK, indices_NK

    def decode(self, acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
        """As `eager.decode`, without an `[N, K, D]` tensor and with a backward pass over the chosen rows only."""
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
        """As `eager.autoencode`; both weight gradients come from one sort of the pairs."""
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
        """As `eager.autoencode_nested`; its weight gradients cost what `autoencode`'s do."""
        acts_NK, indices_NK, pairs = self._encode(x_ND, W_enc_MD, b_enc_M, k, centre_D, parts)
        acts_NK = keep_above(acts_NK, threshold)
        rows_GND = _DecodeNested.apply(acts_NK, indices_NK, W_dec_MD, pairs, self.ops, prefixes)
        return rows_GND, acts_NK, indices_NK

    @property
    def adam_(self) -> Callable[..., None]:
        """As `eager.adam_`, in one pass over memory; of a gradient of `RowSums`, too."""
        return self.ops.adam_

    def sum_rows(self, sums: RowSums) -> Tensor:
        """As `RowSums.dense`."""
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
    """Return the number of candidates that low precision names for `k` latents, equally many in each part."""
    each = k // parts
    spare = max(each // 2, LEAST_SPARE // parts, 1)
    return min(each + spare, num_latents // parts) * parts


def low_precision_pays(k: int, num_latents: int, parts: int = 1) -> bool:
    """Tell whether candidates for `k` latents are so few that to name them in low precision can save time."""
    return num_candidates(k, num_latents, parts) * WORTH_FROM <= num_latents


def least_latents(k: int) -> int:
    """Return the smallest number of latents for which `low_precision_pays`."""
    return (k + max(k // 2, LEAST_SPARE, 1)) * WORTH_FROM


class _Pairs:
    """The pairs (latent, token) of a k-sparse code, sorted by latent once for all sums over them, when first needed."""

    def __init__(self, indices_NK: Tensor | None, num_latents: int, ops: Ops) -> None:
        self.indices_NK = indices_NK
        self.num_latents = num_latents
        self.ops = ops

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.indices_NK is not None, "encode sets them"
        return self.ops.sort_pairs(self.indices_NK, self.num_latents)

    def sum(self, coefficients_NK: Tensor, rows_ND: Tensor, shifts_NK: Tensor | None = None) -> Tensor:
        """`out[m] = Σ_{(n,k): indices[n,k]=m} coefficients[n,k] · rows[n + shifts[n,k]]`: `[M, D]`."""
        return self.ops.segment_sum(*self._sums(coefficients_NK, rows_ND, shifts_NK))

    def gradient(
        self, W_MD: Tensor, coefficients_NK: Tensor, rows_ND: Tensor, shifts_NK: Tensor | None = None
    ) -> Tensor | None:
        """Return the same as the gradient of a matrix; None where that is left to the step."""
        sums = self._sums(coefficients_NK, rows_ND, shifts_NK)
        return None if left_to_the_step(W_MD, sums) else self.ops.segment_sum(*sums)

    def _sums(self, coefficients_NK: Tensor, rows_ND: Tensor, shifts_NK: Tensor | None) -> RowSums:
        order, tokens, starts_M = self._sorted
        if shifts_NK is not None:
            tokens = tokens + shifts_NK.flatten()[order]
        return RowSums(coefficients_NK.flatten()[order].to(rows_ND.dtype), tokens, starts_M, rows_ND)


class _EncodeTopK(torch.autograd.Function):
    """Top-k of a ReLU-linear layer. The gradient passes where a chosen value is positive: that is ReLU's mask."""

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
        # ReLU after the choice gives the same values as before it, and touches K instead of M numbers per token.
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
            # Not `index_add_`, which adds in any order on a GPU.
            db_M = pairs.sum(grad_NK, x_ND.new_ones(x_ND.shape[0], 1)).squeeze(1)
        # Summed over tokens first, the centre's gradient is a matrix times a vector; no token needs one of its own.
        dcentre_D = -(db_M @ W_MD) if need_centre else None
        return dx_ND, dW_MD, db_M if need_b else None, dcentre_D, None, None, None, None, None


class _Decode(torch.autograd.Function):
    """Sums of chosen rows."""

    @staticmethod
    def forward(ctx: Any, acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor, pairs: _Pairs, ops: Ops) -> Tensor:
        ctx.save_for_backward(acts_NK, indices_NK, W_MD)
        ctx.pairs, ctx.ops = pairs, ops
        return ops.gather_sum(acts_NK, indices_NK, W_MD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        acts_NK, indices_NK, W_MD = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()  # the gradient of a mere sum is an expanded scalar
        need_acts, _, need_W, *_ = ctx.needs_input_grad
        dacts_NK = ctx.ops.gather_dot(grad_ND, W_MD, indices_NK) if need_acts else None
        dW_MD = ctx.pairs.gradient(W_MD, acts_NK, grad_ND) if need_W else None
        return dacts_NK, None, dW_MD, None, None


class _DecodeNested(torch.autograd.Function):
    """Sums of chosen rows, `[G, N, D]`: for each prefix, of those below it."""

    @staticmethod
    def forward(
        ctx: Any, acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor, pairs: _Pairs, ops: Ops, prefixes: tuple[int, ...]
    ) -> Tensor:
        # Which prefix is the first to hold a latent: the group it adds to, and to all groups behind.
        # Compared one by one: a tensor of the prefixes would be brought to the device in every step.
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
        # What a latent of a group is told: the gradients of all sums that it is in.
        told_GND = grad_GND.flip(0).cumsum_(0).flip(0)
        need_acts, _, need_W, *_ = ctx.needs_input_grad
        dacts_NK = dW_MD = None
        if need_acts:
            dacts_NK = torch.zeros_like(acts_NK)
            for group, told_ND in enumerate(told_GND):
                dots_NK = ctx.ops.gather_dot(told_ND, W_MD, indices_NK)
                dacts_NK = torch.where(groups_NK == group, dots_NK, dacts_NK)
        if need_W:
            shifts_NK = groups_NK * told_GND.shape[1]
            dW_MD = ctx.pairs.gradient(W_MD, acts_NK, told_GND.flatten(0, 1), shifts_NK)
        return dacts_NK, None, dW_MD, None, None, None
