"""Dense scores `x Wᵀ + b` of some tokens at a time, in the precisions that select: what the top-k of a CPU reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
"""The scores of a chunk of tokens fit in a CPU's last-level cache until the top-k reads them."""
SHARED_FROM = 2**15
"""Numbers below which torch's `topk` leaves all of them to one thread; a chunk has twice as many for its last stage."""
GROUP = 4
"""Scores per group of that top-k; 8 is as good where there are many latents, and worse where there are few."""
MOST_CHUNK_BYTES = 8 * CHUNK_BYTES
"""The largest size of a chunk's scores."""
ROWS = 256
"""Rows of bfloat16 in a chunk are a multiple of these: a matmul of 341 rows takes what one of 448 does (AMX)."""
COLUMNS = 32
"""Columns of bfloat16 that a matmul takes at once (AMX): a row is filled up to a multiple of them."""
INT8 = 127
"""The largest magnitude of a number in 8 bits; -128 is left out, so that signs are alike."""
SAMPLED_ROWS = 1024
"""At least this many rows, or all if there are fewer, tell how large a dimension is."""
LEAST_SCALE = 1e-30
"""Of a row of zeros; a bias can still be divided by it in float32."""


def chunk_rows(N: int, M: int, k: int, dtype: torch.dtype, bytes_per_score: int) -> int:
    """Return how many of N tokens are scored at a time: the cache's size, and enough to divide a top-k."""
    rows = max(CHUNK_BYTES // (bytes_per_score * M), 2 * SHARED_FROM // (GROUP * max(1, k)))
    if dtype == torch.bfloat16:
        rows = -(-rows // ROWS) * ROWS
    return max(1, min(rows, MOST_CHUNK_BYTES // (bytes_per_score * M), N))


def pieces(total: int, size: int, device: torch.device) -> Iterator[slice]:
    """Cut `total` rows into slices of `size`, the last of which may be shorter.

    On torch's meta device, where memory is planned, only the first two are given. None is larger, and two show what one
    turn of a loop leaves in memory for the next; a plan would else take as long as the loop has turns.
    """
    stop = min(total, 2 * size) if device.type == "meta" else total
    for start in range(0, stop, size):
        yield slice(start, min(start + size, total))


def exact(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """From at most `rows` tokens to their scores `[n, M]`; the next call overwrites them."""
    products_of = products(x_ND, W_MD, rows)
    # A bias added in place costs half of what `addmm` takes for it.
    return lambda some: products_of(some).add_(b_M)


def products(x_ND: Tensor, W_MD: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """As `exact`, without the bias."""
    buffer, W_DM = x_ND.new_empty(rows, W_MD.shape[0]), W_MD.t()

    def products_of(some: slice) -> Tensor:
        x_nD = x_ND[some]
        return torch.mm(x_nD, W_DM, out=buffer[: len(x_nD)])

    return products_of


def in_bfloat16(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """As `exact`, in bfloat16.

    The bias is one more column of the weights, times a column of ones, and a second one holds what it loses by
    rounding. That costs the matmul nothing that could be measured; adding it takes a fifth of the matmul's time.
    """
    D = x_ND.shape[1]
    width = -(-(D + 2) // COLUMNS) * COLUMNS
    x_low_NE, W_low_ME = (each.new_empty(len(each), width, dtype=torch.bfloat16) for each in (x_ND, W_MD))
    x_low_NE[:, :D], x_low_NE[:, D:] = x_ND, 1
    W_low_ME[:, :D], W_low_ME[:, D], W_low_ME[:, D + 2 :] = W_MD, b_M, 0
    W_low_ME[:, D + 1] = (b_M - W_low_ME[:, D]).nan_to_num_(0.0)  # of an infinite bias nothing is left
    buffer, W_low_EM = x_low_NE.new_empty(rows, len(W_MD)), W_low_ME.t()

    def scores_of(some: slice) -> Tensor:
        x_low_nE = x_low_NE[some]
        return torch.mm(x_low_nE, W_low_EM, out=buffer[: len(x_low_nE)])

    return scores_of


def in_8_bits(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """As `exact`, from `Rounded` factors; in a unit of each token's own."""
    M, rounded = W_MD.shape[0], round_to_8_bits(x_ND, W_MD)
    buffer = x_ND.new_empty(rows, M, dtype=torch.float32)
    # Each call packs the weights it is given again, so tiles are as long as a chunk, and as wide as the cache allows
    # for their sums to be there still when they are scaled.
    width = max(1, min(M, CHUNK_BYTES // (8 * rows)))
    sums = x_ND.new_empty(rows * width, dtype=torch.int32)

    def scores_of(some: slice) -> Tensor:
        x_int_nD, one_over_x_n1 = rounded.x_ND[some], rounded.one_over_x_N[some, None]
        n = len(x_int_nD)
        for part in pieces(M, width, x_ND.device):
            sums_nm = sums[: n * (part.stop - part.start)].view(n, -1)
            torch._int_mm(x_int_nD, rounded.W_DM[:, part], out=sums_nm)
            # All divided by the token's scale, which changes no order within it: so only the bias needs a division.
            buffer[:n, part].copy_(sums_nm).mul_(rounded.W_scale_M[part]).addcmul_(one_over_x_n1, b_M[part])
        return buffer[:n]

    return scores_of


class Rounded(NamedTuple):
    """Both factors in 8 bits, with a scale per token and per latent."""

    x_ND: Tensor
    one_over_x_N: Tensor
    W_DM: Tensor
    W_scale_M: Tensor

    def products(self, rows: int) -> Callable[[slice], Tensor]:
        """From at most `rows` tokens to the sums of their products, `[n, M]`, int32; the next call overwrites them."""
        buffer = self.x_ND.new_empty(rows, self.W_DM.shape[1], dtype=torch.int32)

        def products_of(some: slice) -> Tensor:
            x_nD = self.x_ND[some]
            return torch._int_mm(x_nD, self.W_DM, out=buffer[: len(x_nD)])

        return products_of


def round_to_8_bits(x_ND: Tensor, W_MD: Tensor) -> Rounded:
    """Factors whose integer product, times `W_scale`, is `x Wᵀ` in a unit of each token's own.

    A few dimensions of a residual stream are far larger than the rest and would leave no bits to them. Both sides get
    the same share of the difference (Xiao et al. 2022, "SmoothQuant", arXiv 2211.10438, with their α = 1/2): dimension
    d of `x` is divided, and of `W` multiplied, by the root of the ratio of their sizes.
    """
    N, (M, D) = x_ND.shape[0], W_MD.shape
    size_D = _mean_square(x_ND) / _mean_square(W_MD).clamp_min_(torch.finfo(W_MD.dtype).tiny)
    balance_D = size_D.nan_to_num_(1.0).clamp_(1e-12, 1e12).pow_(0.25)  # what is not a number spoils its own row only
    x_int_ND, x_scale_N = x_ND.new_empty(N, D, dtype=torch.int8), x_ND.new_empty(N)
    W_int_MD, W_scale_M = W_MD.new_empty(M, D, dtype=torch.int8), W_MD.new_empty(M)
    _round_to_8_bits(x_ND, 1 / balance_D, x_int_ND, x_scale_N)
    _round_to_8_bits(W_MD, balance_D, W_int_MD, W_scale_M)
    return Rounded(x_int_ND, 1 / x_scale_N, W_int_MD.t(), W_scale_M)


def _mean_square(rows_RD: Tensor) -> Tensor:
    """Of each dimension, about: from a part of the rows if there are many."""
    return rows_RD[:: max(1, len(rows_RD) // SAMPLED_ROWS)].square().mean(0)


def _round_to_8_bits(rows_RD: Tensor, factor_D: Tensor, out_RD: Tensor, scale_R: Tensor) -> None:
    """`rows · factor` in 8 bits into `out_RD`, and what each row is to be multiplied by again into `scale_R`."""
    count = max(1, CHUNK_BYTES // 2 // (4 * max(1, rows_RD.shape[1])))  # of rows, that stay in the cache
    for some in pieces(len(rows_RD), count, rows_RD.device):
        scaled_rD = rows_RD[some] * factor_D
        scale_R[some] = scaled_rD.abs().amax(1).div_(INT8).clamp_min_(LEAST_SCALE)
        out_RD[some] = scaled_rD.mul_(1 / scale_R[some, None]).round_()
