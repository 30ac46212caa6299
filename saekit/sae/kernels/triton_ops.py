"""The sparse operations as Triton kernels: the backend `triton`. `torch_ops` documents what each of them computes.

They need a CUDA device of the Ampere generation or later (torch 2.11 to 2.13, Triton 3.6 to 3.9). The tests compare
them with the formulas in Triton's interpreter, and compile them for compute capabilities 8.0 to 10.0
(tests/sae/test_triton_compiles.py). Block sizes are the fastest of those tried on an H200 (docs/performance-gpu.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit.sae.kernels import triton_adam
from saekit.sae.kernels.eager import topk_in_parts
from saekit.sae.kernels.row_sums import RowSums
from saekit.sae.kernels.scores import pieces
from saekit.sae.kernels.torch_ops import best_of, sort_pairs
from saekit.sae.kernels.triton_adam import OPTIONS, adam_rows, on_its_device

__all__ = ["INTERPRETED", "adam_", "best_of", "gather_dot", "gather_sum", "segment_sum", "sort_pairs", "topk"]

INTERPRETED = not isinstance(adam_rows, triton.runtime.jit.JITFunction)
"""Whether Triton runs these kernels in its interpreter, on any device. Triton decides this at the first `jit`."""
CHUNK_BYTES = 2**30
"""The largest size of the scores that are computed at a time."""
GROUP = 32
"""Latents per group, each of which has one maximum."""
MAXIMA_BLOCK, MAXIMA_WARPS = 8192, 8
"""Scores that one program of `_maxima` reads, 32 per thread."""
MEMBERS_BLOCK = 64
"""Groups that one program of `_members` reads."""
SLICE = 64
"""Columns that are processed for all tokens before the next columns are read. For 131,072 rows they take 32 MiB and fit
into the L2 cache of a data center GPU (40 MiB on an A100, 50 on an H100), so memory is not read again for each
token."""
ROWS = 16
"""Rows of a slice that one program reads at a time."""
PARTIAL_BYTES = 2**28
"""The largest size of the slices' products before they are summed."""
SEGMENT_BLOCK = 1024
"""Numbers that one program of `segment_sum` reads at a time: 2 rows if rows are long."""


@triton.jit(do_not_specialize=["M"])
def _maxima(scores_ptr, b_ptr, maxima_ptr, M, padded_M, BLOCK: tl.constexpr, G: tl.constexpr):
    """Compute the largest score of each group, with the bias."""
    n, m = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + n * padded_M + m, mask=m < M, other=float("-inf")).to(tl.float32)
    scores += tl.load(b_ptr + m, mask=m < M, other=0.0).to(tl.float32)
    # Round the sums first: a maximum must equal one of the scores that `_members` computes.
    scores = scores.to(maxima_ptr.dtype.element_ty).to(tl.float32)
    maxima = tl.max(tl.reshape(scores, (BLOCK // G, G)), axis=1)
    g = tl.program_id(1) * (BLOCK // G) + tl.arange(0, BLOCK // G)
    tl.store(maxima_ptr + n * (padded_M // G) + g, maxima.to(maxima_ptr.dtype.element_ty), mask=g < padded_M // G)


@triton.jit(do_not_specialize=["M", "K"])
def _members(scores_ptr, b_ptr, groups_ptr, out_ptr, M, padded_M, K, BK: tl.constexpr, G: tl.constexpr):
    """Compute the scores of K groups of each token, rounded as they were for the maxima."""
    n, k, g = tl.program_id(0).to(tl.int64), tl.program_id(1) * BK + tl.arange(0, BK), tl.arange(0, G)
    groups = tl.load(groups_ptr + n * K + k, mask=k < K, other=0)
    m = groups[:, None] * G + g[None, :]
    scores = tl.load(scores_ptr + n * padded_M + m, mask=m < M, other=float("-inf")).to(tl.float32)
    scores += tl.load(b_ptr + m, mask=m < M, other=0.0).to(tl.float32)
    at = (n * K + k)[:, None] * G + g[None, :]
    tl.store(out_ptr + at, scores.to(out_ptr.dtype.element_ty), mask=k[:, None] < K)


@triton.jit(do_not_specialize=["K", "nK"])
def _gather_dot(x_ptr, w_ptr, indices_ptr, out_ptr, K, nK, D, BK: tl.constexpr, BD: tl.constexpr):
    """Compute a slice of columns' share of the dot products."""
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    out_ptr += tl.program_id(1).to(tl.int64) * nK + n * K
    x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        rows = tl.load(indices_ptr + n * K + k, mask=k < K, other=0).to(tl.int64)
        w = tl.load(w_ptr + rows[:, None] * D + d[None, :], mask=(k[:, None] < K) & (d[None, :] < D), other=0.0)
        tl.store(out_ptr + k, tl.sum(w.to(tl.float32) * x[None, :], axis=1), mask=k < K)


@triton.jit(do_not_specialize=["K"])
def _gather_sum(weights_ptr, indices_ptr, w_ptr, out_ptr, K, D, BK: tl.constexpr, BD: tl.constexpr):
    """Compute a slice of columns of the sums."""
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    sums = tl.zeros((BK, BD), dtype=tl.float32)
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        rows = tl.load(indices_ptr + n * K + k, mask=k < K, other=0).to(tl.int64)
        weights = tl.load(weights_ptr + n * K + k, mask=k < K, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + rows[:, None] * D + d[None, :], mask=(k[:, None] < K) & (d[None, :] < D), other=0.0)
        sums += weights[:, None] * w.to(tl.float32)
    tl.store(out_ptr + n * D + d, tl.sum(sums, axis=0), mask=d < D)


@triton.jit
def _segment_sum(weights_ptr, tokens_ptr, starts_ptr, rows_ptr, out_ptr, D, BP: tl.constexpr, BD: tl.constexpr):
    """Compute a block of columns of one latent's sum."""
    m, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    end = tl.load(starts_ptr + m + 1)
    sums = tl.zeros((BP, BD), dtype=tl.float32)
    for first in range(tl.load(starts_ptr + m), end, BP):
        pair = first + tl.arange(0, BP)
        token = tl.load(tokens_ptr + pair, mask=pair < end, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + pair, mask=pair < end, other=0.0).to(tl.float32)
        mask = (pair[:, None] < end) & (d[None, :] < D)
        rows = tl.load(rows_ptr + token[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += weight[:, None] * rows
    tl.store(out_ptr + m * D + d, tl.sum(sums, axis=0), mask=d < D)


@on_its_device
def topk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, dtype: torch.dtype, in_order: bool = True, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the `k` largest scores of each token, computed in `dtype` with float32 sums, and their latents.

    The matmul is torch's. The `k` largest scores are in the `k` groups with the largest maxima. One pass over the
    scores computes the maxima, and then only `k` groups per token are read again. A matmul of our own could compute the
    maxima while its tiles are in registers, but the best one took longer than torch's plus this pass
    (docs/performance-gpu.md). Scores are sorted, largest first, if `in_order`. Among equal scores any may be chosen.

    With several parts, return the `k / parts` largest of each of `parts` equal parts of the latents, part by part.
    Groups may cross the parts' borders, so in this case all scores are read again.

    Returns:
        Scores `[N, K]` in `dtype` and latents `[N, K]`, int64.
    """
    N, M = x_ND.shape[0], W_MD.shape[0]
    padded = triton.cdiv(M, GROUP) * GROUP
    rows = max(1, min(N, CHUNK_BYTES // (padded * dtype.itemsize)))
    x_ND, W_MD, b_M = x_ND.to(dtype), W_MD.to(dtype), b_M.to(dtype)
    scores = x_ND.new_empty(rows, padded)
    values_NK = x_ND.new_empty(N, k)
    indices_NK = torch.empty(N, k, dtype=torch.int64, device=x_ND.device)
    for some in pieces(N, rows, x_ND.device):
        x_nD = x_ND[some]
        scores_nM = scores[: len(x_nD)]
        torch.mm(x_nD, W_MD.t(), out=scores_nM[:, :M])
        if parts > 1:
            found = topk_in_parts(scores_nM[:, :M].add_(b_M), k, parts)
        else:
            found = _topk_of_groups(scores_nM, b_M, k, in_order)
        values_NK[some], indices_NK[some] = found
    return values_NK, indices_NK


def _topk_of_groups(scores_NM: Tensor, b_M: Tensor, k: int, in_order: bool) -> tuple[Tensor, Tensor]:
    """Return the `k` largest scores plus bias of each token, and their latents. Scores are padded to whole groups."""
    (N, padded), M = scores_NM.shape, len(b_M)
    groups = padded // GROUP
    if k >= groups:
        return scores_NM[:, :M].add_(b_M).topk(k, dim=-1, sorted=in_order)
    maxima_NG = scores_NM.new_empty(N, groups)
    block = _block(padded, MAXIMA_BLOCK)
    _maxima[(N, triton.cdiv(padded, block))](
        scores_NM, b_M, maxima_NG, M, padded, BLOCK=block, G=GROUP, num_warps=MAXIMA_WARPS, **OPTIONS
    )
    best_NK = maxima_NG.topk(k, dim=-1, sorted=False).indices
    members = scores_NM.new_empty(N, k * GROUP)
    _members[(N, triton.cdiv(k, MEMBERS_BLOCK))](
        scores_NM, b_M, best_NK, members, M, padded, k, BK=MEMBERS_BLOCK, G=GROUP, **OPTIONS
    )
    values_NK, at_NK = members.topk(k, dim=-1, sorted=in_order)
    group_NK = at_NK // GROUP
    return values_NK, best_NK.gather(1, group_NK).sub_(group_NK).mul_(GROUP).add_(at_NK)


@on_its_device
def gather_dot(x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
    """Compute `out[n, k] = ⟨x[n], W[indices[n, k]]⟩`, `[N, K]`, summed in float32 in a fixed order."""
    (N, K), D = indices_NK.shape, W_MD.shape[1]
    if N * K == 0:
        return x_ND.new_empty(N, K)
    x_ND, W_MD, indices_NK = x_ND.contiguous(), W_MD.contiguous(), indices_NK.contiguous()
    block = _block(D, SLICE)
    slices = triton.cdiv(D, block)
    rows = min(N, max(1, PARTIAL_BYTES // (4 * slices * K)))
    out_NK = x_ND.new_empty(N, K)
    products_SnK = x_ND.new_empty(slices, rows, K)
    for some in pieces(N, rows, x_ND.device):
        _gather_dot[(some.stop - some.start, slices)](
            x_ND[some], W_MD, indices_NK[some], products_SnK, K, rows * K, D, BK=ROWS, BD=block, num_warps=1, **OPTIONS
        )
        torch.sum(products_SnK[:, : some.stop - some.start], 0, out=out_NK[some])
    return out_NK


@on_its_device
def gather_sum(weights_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
    """Compute `out[n] = Σ_k weights[n, k] · W[indices[n, k]]`, `[N, D]`, summed in float32 in a fixed order."""
    (N, K), D = indices_NK.shape, W_MD.shape[1]
    out_ND = W_MD.new_empty(N, D)
    if N:
        block = _block(D, SLICE)
        weights_NK, indices_NK, W_MD = weights_NK.contiguous(), indices_NK.contiguous(), W_MD.contiguous()
        _gather_sum[(N, triton.cdiv(D, block))](
            weights_NK, indices_NK, W_MD, out_ND, K, D, BK=ROWS, BD=block, num_warps=1, **OPTIONS
        )
    return out_ND


@on_its_device
def segment_sum(weights_P: Tensor, tokens_P: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
    """Compute `out[m] = Σ_p weights[p] · rows[tokens[p]]` over the pairs of latent m, `[M, D]`, in a fixed order.

    Runs one program per latent and block of columns, without atomics. A latent that fires on every token is a long
    loop, but each of its column blocks has its own program, and programs of other latents run at the same time.
    """
    M, D = len(starts_M) - 1, rows_ND.shape[1]
    out_MD = rows_ND.new_empty(M, D)
    if M:
        block = _block(D, 512)
        pairs = min(128, SEGMENT_BLOCK // block)
        grid = (M, triton.cdiv(D, block))
        weights_P, rows_ND = weights_P.contiguous(), rows_ND.contiguous()
        _segment_sum[grid](weights_P, tokens_P, starts_M, rows_ND, out_MD, D, BP=pairs, BD=block, **OPTIONS)
    return out_MD


def _block(size: int, most: int) -> int:
    return min(most, 2 ** math.ceil(math.log2(max(1, size))))


def adam_(param: Tensor, grad: Tensor | RowSums, *moments: Tensor, **settings: Any) -> None:
    """Compute `triton_adam.adam_`. A gradient of `RowSums` is summed first."""
    triton_adam.adam_(param, segment_sum(*grad) if isinstance(grad, RowSums) else grad, *moments, **settings)
