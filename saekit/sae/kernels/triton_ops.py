"""The sparse operations as Triton kernels: the backend `triton`. See `torch_ops` for what each of them computes.

For CUDA devices of the Ampere generation or later (torch 2.11 to 2.13, Triton 3.6 to 3.9). They run in Triton's
interpreter, where the tests hold them to the formulas, and are compiled for compute capabilities 8.0 to 10.0
(tests/sae/test_triton_compiles.py). No GPU has run them yet: sizes of blocks are reasoned and not tuned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from saekit.sae.kernels.eager import topk_in_parts
from saekit.sae.kernels.triton_adam import OPTIONS, adam_, adam_rows, on_its_device

__all__ = ["INTERPRETED", "adam_", "gather_dot", "gather_sum", "segment_sum", "topk"]

INTERPRETED = not isinstance(adam_rows, triton.runtime.jit.JITFunction)
"""Whether Triton runs these kernels in its interpreter, on any device; it decides so when it sees a kernel."""
CHUNK_BYTES = 2**30
"""Scores are made for so many tokens at a time that they take no more than this."""
GROUP = 32
"""Latents whose largest score the matmul's epilogue writes out."""
BLOCK_K = 16
"""Rows that one program of `gather_dot` reads at a time."""
SEGMENT_BLOCK = 2048
"""Numbers that one program of `segment_sum` reads at a time: 4 rows, where rows are long; a mean latent has as many."""


class Tile(NamedTuple):
    """What one program of the matmul makes, and how."""

    tokens: int
    latents: int
    width: int
    """Dimensions that it reads at a time."""
    warps: int
    stages: int
    """Reads under way at a time, each of `(tokens + latents) · width` numbers in shared memory."""


TINY = Tile(16, 64, 32, warps=4, stages=1)
"""For the interpreter."""
SMALL = Tile(128, 128, 32, warps=4, stages=4)
# The other way round, 128 x 256, Triton 3.6 needs so many registers on an H100 that its matmuls wait for each other.
LARGE = Tile(256, 128, 64, warps=8, stages=3)
LARGE_FROM = 160 * 1024
"""Shared memory per program, in bytes, of the GPUs that the large tile is for: 163 KiB on an A100, 227 on an H100, but
99 on those that are not made for data centres (8.6, 8.9, 12.0)."""


@triton.jit(do_not_specialize=["N", "M"])
def _scores(
    x_ptr,
    w_ptr,
    b_ptr,
    scores_ptr,
    maxima_ptr,
    N,
    M,
    D,
    padded_M,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    G: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A tile of `x Wᵀ + b`, and the maxima of its groups while it is still in registers. D is a multiple of BD."""
    # Eight blocks of latents at a time go past all tokens, so that both stay in the L2 cache.
    pid = tl.program_id(0)
    n_blocks, m_blocks = tl.cdiv(N, BN), tl.cdiv(M, BM)
    first = pid // (8 * n_blocks) * 8
    wide = tl.minimum(m_blocks - first, 8)
    within = pid % (8 * n_blocks)
    n = within // wide * BN + tl.arange(0, BN)
    m = (first + within % wide) * BM + tl.arange(0, BM)
    # Where a tile hangs over the edge, the last row is read again, which costs the loop nothing; a mask would.
    x_rows = tl.minimum(n, N - 1).to(tl.int64)[:, None] * D
    w_rows = tl.minimum(m, M - 1).to(tl.int64)[None, :] * D
    tile = tl.zeros((BN, BM), dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        x, w = tl.load(x_ptr + x_rows + d[None, :]), tl.load(w_ptr + w_rows + d[:, None])
        if WIDEN:  # the interpreter takes bfloat16 for what it is stored as, integers
            x, w = x.to(tl.float32), w.to(tl.float32)
        tile = tl.dot(x, w, tile)
    tile += tl.load(b_ptr + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
    tile = tl.where(m[None, :] < M, tile, float("-inf")).to(scores_ptr.dtype.element_ty)
    tl.store(scores_ptr + n.to(tl.int64)[:, None] * padded_M + m[None, :], tile, mask=n[:, None] < N)
    # Of the rounded scores: a maximum must be one of those that are compared afterwards.
    maxima = tl.max(tl.reshape(tile.to(tl.float32), (BN, BM // G, G)), axis=2)
    g = (first + within % wide) * (BM // G) + tl.arange(0, BM // G)
    at = n.to(tl.int64)[:, None] * (padded_M // G) + g[None, :]
    tl.store(maxima_ptr + at, maxima.to(maxima_ptr.dtype.element_ty), mask=n[:, None] < N)


@triton.jit(do_not_specialize=["K"])
def _gather_dot(x_ptr, w_ptr, indices_ptr, out_ptr, K, D, BK: tl.constexpr, BD: tl.constexpr):
    n, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BK + tl.arange(0, BK)
    rows = tl.load(indices_ptr + n * K + k, mask=k < K, other=0).to(tl.int64)
    products = tl.zeros((BK, BD), dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        x = tl.load(x_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + rows[:, None] * D + d[None, :], mask=(k[:, None] < K) & (d[None, :] < D), other=0.0)
        products += w.to(tl.float32) * x[None, :]
    # Summed over threads once, behind the loop.
    tl.store(out_ptr + n * K + k, tl.sum(products, axis=1), mask=k < K)


@triton.jit(do_not_specialize=["K"])
def _gather_sum(weights_ptr, indices_ptr, w_ptr, out_ptr, K, D, BD: tl.constexpr):
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    sums = tl.zeros((BD,), dtype=tl.float32)
    for k in range(0, K):
        row = tl.load(indices_ptr + n * K + k).to(tl.int64)
        weight = tl.load(weights_ptr + n * K + k).to(tl.float32)
        sums += weight * tl.load(w_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * D + d, sums, mask=d < D)


@triton.jit
def _segment_sum(weights_ptr, tokens_ptr, starts_ptr, rows_ptr, out_ptr, D, BP: tl.constexpr, BD: tl.constexpr):
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
    """The `k` largest scores of each token, computed in `dtype` with float32 sums, and their latents.

    The `k` largest lie in the `k` groups with the largest maxima, and in 16 bits those come out of the matmul's
    epilogue, so that of the scores only `k` groups per token are read again. In float32 the matmul is torch's: tensor
    cores have no float32 (tf32 keeps 10 bits of it), and what Triton makes without them spills its registers.
    Among equal scores any may be chosen. They come largest first if `in_order`.

    With `parts` it is the `k / parts` largest of each of so many equal parts of the latents, part by part; the groups
    may lie across the parts' borders, so all scores are read again.

    Returns:
        Scores `[N, K]` in `dtype` and latents `[N, K]`, int64.
    """
    N, (M, D) = x_ND.shape[0], W_MD.shape
    tile = _tile()
    padded = triton.cdiv(M, tile.latents) * tile.latents
    rows = max(1, min(N, CHUNK_BYTES // (padded * dtype.itemsize)))
    x_ND, W_MD = x_ND.to(dtype), W_MD.to(dtype)
    by_kernel = dtype.itemsize == 2
    if by_kernel and D % tile.width:  # whole blocks need no bounds, and their rows start where 16 bytes can be read
        x_ND, W_MD = (F.pad(each, (0, -D % tile.width)) for each in (x_ND, W_MD))
    x_ND, W_MD = x_ND.contiguous(), W_MD.contiguous()
    scores = x_ND.new_empty(rows, padded)
    if not by_kernel:
        scores[:, M:] = float("-inf")
    maxima = x_ND.new_empty(rows, padded // GROUP)
    values_NK = x_ND.new_empty(N, k)
    indices_NK = torch.empty(N, k, dtype=torch.int64, device=x_ND.device)
    for start in range(0, N, rows):
        x_nD = x_ND[start : start + rows]
        n = len(x_nD)
        if by_kernel:
            _scores[(triton.cdiv(n, tile.tokens) * (padded // tile.latents),)](
                x_nD, W_MD, b_M, scores, maxima, n, M, x_ND.shape[1], padded,
                BN=tile.tokens, BM=tile.latents, BD=tile.width, G=GROUP, WIDEN=INTERPRETED,
                num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
            )  # fmt: skip
        else:
            torch.mm(x_nD, W_MD.t(), out=scores[:n, :M]).add_(b_M)
            torch.amax(scores[:n].view(n, -1, GROUP), 2, out=maxima[:n])
        if parts > 1:
            found = topk_in_parts(scores[:n, :M], k, parts)
        else:
            found = _topk_of_groups(scores[:n], maxima[:n], k, in_order)
        values_NK[start : start + n], indices_NK[start : start + n] = found
    return values_NK, indices_NK


def _tile() -> Tile:
    """For the current device."""
    if INTERPRETED:
        return TINY
    active = triton.runtime.driver.active
    limits = active.utils.get_device_properties(active.get_current_device())
    return LARGE if limits["max_shared_mem"] >= LARGE_FROM else SMALL


def _topk_of_groups(scores_NM: Tensor, maxima_NG: Tensor, k: int, in_order: bool) -> tuple[Tensor, Tensor]:
    N, groups = maxima_NG.shape
    if k >= groups:
        return scores_NM.topk(k, dim=-1, sorted=in_order)
    best_NK = maxima_NG.topk(k, dim=-1, sorted=False).indices
    members = scores_NM.view(N, groups, GROUP).gather(1, best_NK[:, :, None].expand(N, k, GROUP))
    values_NK, at_NK = members.view(N, k * GROUP).topk(k, dim=-1, sorted=in_order)
    group_NK = at_NK // GROUP
    return values_NK, best_NK.gather(1, group_NK) * GROUP + (at_NK - group_NK * GROUP)


@on_its_device
def gather_dot(x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
    """`out[n, k] = ⟨x[n], W[indices[n, k]]⟩`: `[N, K]`, summed in float32."""
    (N, K), D = indices_NK.shape, W_MD.shape[1]
    out_NK = x_ND.new_empty(N, K)
    if N * K:
        grid = (N, triton.cdiv(K, BLOCK_K))
        x_ND, W_MD, indices_NK = x_ND.contiguous(), W_MD.contiguous(), indices_NK.contiguous()
        _gather_dot[grid](x_ND, W_MD, indices_NK, out_NK, K, D, BK=BLOCK_K, BD=_block(D, 128), **OPTIONS)
    return out_NK


@on_its_device
def gather_sum(weights_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
    """`out[n] = Σ_k weights[n, k] · W[indices[n, k]]`: `[N, D]`, summed in float32 in the order of `k`."""
    (N, K), D = indices_NK.shape, W_MD.shape[1]
    out_ND = W_MD.new_empty(N, D)
    if N:
        block = _block(D, 512)
        grid = (N, triton.cdiv(D, block))
        weights_NK, indices_NK = weights_NK.contiguous(), indices_NK.contiguous()
        _gather_sum[grid](weights_NK, indices_NK, W_MD.contiguous(), out_ND, K, D, BD=block, **OPTIONS)
    return out_ND


@on_its_device
def segment_sum(weights_P: Tensor, tokens_P: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
    """`out[m] = Σ_p weights[p] · rows[tokens[p]]` over the pairs of latent m: `[M, D]`, in an order that is fixed.

    One program per latent and block of columns, without atomics: a latent that fires on every token is a long loop,
    but a loop of each column block on its own, and the blocks of other latents run beside it.
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
