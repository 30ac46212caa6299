"""Compute dense scores `x Wᵀ + b` for a chunk of tokens at a time, as input of the top-k on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
"""Target size of a chunk's scores, which should stay in a CPU's last-level cache until the top-k reads them."""
SHARED_FROM = 2**15
"""torch's `topk` uses one thread for fewer numbers than this. A chunk has at least twice as many in its last stage."""
GROUP = 4
"""Scores per group of the top-k. 8 is as fast with many latents, and slower with few."""
MOST_CHUNK_BYTES = 8 * CHUNK_BYTES
"""The largest size of a chunk's scores."""
ROWS = 256
"""Chunks in bfloat16 have a multiple of this number of rows. With AMX, 341 rows take as long as 448 in a matmul."""
COLUMNS = 32
"""The number of bfloat16 columns that AMX processes at once. Rows are padded to a multiple of it."""
INT8 = 127
"""The largest magnitude of a number in 8 bits. -128 is not used, so that the range is symmetric."""
SAMPLED_ROWS = 1024
"""The size of a dimension is estimated from at least this many rows, or from all if there are fewer."""
LEAST_SCALE = 1e-30
"""The scale of a row of zeros. A bias divided by it does not overflow in float32."""


def chunk_rows(N: int, M: int, k: int, dtype: torch.dtype, bytes_per_score: int) -> int:
    """Return how many of N tokens to score at a time: as many as fit in the cache, but enough for a parallel top-k."""
    rows = max(CHUNK_BYTES // (bytes_per_score * M), 2 * SHARED_FROM // (GROUP * max(1, k)))
    if dtype == torch.bfloat16:
        rows = -(-rows // ROWS) * ROWS
    return max(1, min(rows, MOST_CHUNK_BYTES // (bytes_per_score * M), N))


def pieces(total: int, size: int, device: torch.device) -> Iterator[slice]:
    """Cut `total` rows into slices of `size`. The last one may be shorter.

    On torch's meta device, which is used to plan memory, yield only the first two. No slice is larger, and two are
    enough to show what one iteration leaves in memory for the next. All of them would make a plan slow.
    """
    stop = min(total, 2 * size) if device.type == "meta" else total
    for start in range(0, stop, size):
        yield slice(start, min(start + size, total))


def exact(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """Return a function from a slice of at most `rows` tokens to their scores `[n, M]`, overwritten by the next."""
    products_of = products(x_ND, W_MD, rows)
    # Adding the bias in place takes half the time that `addmm` spends on it.
    return lambda some: products_of(some).add_(b_M)


def products(x_ND: Tensor, W_MD: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """Like `exact`, without the bias."""
    buffer, W_DM = x_ND.new_empty(rows, W_MD.shape[0]), W_MD.t()

    def products_of(some: slice) -> Tensor:
        x_nD = x_ND[some]
        return torch.mm(x_nD, W_DM, out=buffer[: len(x_nD)])

    return products_of


def in_bfloat16(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """Like `exact`, in bfloat16.

    The bias is an extra column of the weights, multiplied by a column of ones. A second extra column holds its rounding
    error. This costs the matmul no measurable time, whereas adding the bias takes a fifth of the matmul's time.
    """
    D = x_ND.shape[1]
    width = -(-(D + 2) // COLUMNS) * COLUMNS
    x_low_NE, W_low_ME = (each.new_empty(len(each), width, dtype=torch.bfloat16) for each in (x_ND, W_MD))
    x_low_NE[:, :D], x_low_NE[:, D:] = x_ND, 1
    W_low_ME[:, :D], W_low_ME[:, D], W_low_ME[:, D + 2 :] = W_MD, b_M, 0
    W_low_ME[:, D + 1] = (b_M - W_low_ME[:, D]).nan_to_num_(0.0)  # Inf − Inf, for an infinite bias, is NaN
    buffer, W_low_EM = x_low_NE.new_empty(rows, len(W_MD)), W_low_ME.t()

    def scores_of(some: slice) -> Tensor:
        x_low_nE = x_low_NE[some]
        return torch.mm(x_low_nE, W_low_EM, out=buffer[: len(x_low_nE)])

    return scores_of


def in_8_bits(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """Like `exact`, from `Rounded` factors. The scores of each token are divided by the token's own scale."""
    M, rounded = W_MD.shape[0], round_to_8_bits(x_ND, W_MD)
    buffer = x_ND.new_empty(rows, M, dtype=torch.float32)
    # Each call of `_int_mm` packs its weights again. So tiles have all rows of a chunk, and as many columns as keep
    # their sums in the cache until they are scaled.
    width = max(1, min(M, CHUNK_BYTES // (8 * rows)))
    sums = x_ND.new_empty(rows * width, dtype=torch.int32)

    def scores_of(some: slice) -> Tensor:
        x_int_nD, one_over_x_n1 = rounded.x_ND[some], rounded.one_over_x_N[some, None]
        n = len(x_int_nD)
        for part in pieces(M, width, x_ND.device):
            sums_nm = sums[: n * (part.stop - part.start)].view(n, -1)
            torch._int_mm(x_int_nD, rounded.W_DM[:, part], out=sums_nm)
            # Dividing by the token's scale keeps the order of its scores, and then only the bias needs a
            # multiplication.
            buffer[:n, part].copy_(sums_nm).mul_(rounded.W_scale_M[part]).addcmul_(one_over_x_n1, b_M[part])
        return buffer[:n]

    return scores_of


class Rounded(NamedTuple):
    """Both factors of a product in 8 bits, with a scale per token and per latent."""

    x_ND: Tensor
    one_over_x_N: Tensor
    W_DM: Tensor
    W_scale_M: Tensor

    def products(self, rows: int) -> Callable[[slice], Tensor]:
        """Return a function from a slice of at most `rows` tokens to their products `[n, M]`, int32, in one buffer."""
        buffer = self.x_ND.new_empty(rows, self.W_DM.shape[1], dtype=torch.int32)

        def products_of(some: slice) -> Tensor:
            x_nD = self.x_ND[some]
            return torch._int_mm(x_nD, self.W_DM, out=buffer[: len(x_nD)])

        return products_of


def round_to_8_bits(x_ND: Tensor, W_MD: Tensor) -> Rounded:
    """Round both factors to 8 bits. Their integer product, times `W_scale`, is `x Wᵀ` divided by each token's scale.

    A few dimensions of a residual stream are far larger than the rest, and would leave no bits for them. The difference
    is split evenly between the factors (Xiao et al. 2022, "SmoothQuant", arXiv 2211.10438, with their α = 1/2):
    dimension d of `x` is divided, and of `W` multiplied, by the square root of the ratio of their sizes.
    """
    N, (M, D) = x_ND.shape[0], W_MD.shape
    size_D = _mean_square(x_ND) / _mean_square(W_MD).clamp_min_(torch.finfo(W_MD.dtype).tiny)
    balance_D = size_D.nan_to_num_(1.0).clamp_(1e-12, 1e12).pow_(0.25)  # so a NaN affects only its own row
    x_int_ND, x_scale_N = x_ND.new_empty(N, D, dtype=torch.int8), x_ND.new_empty(N)
    W_int_MD, W_scale_M = W_MD.new_empty(M, D, dtype=torch.int8), W_MD.new_empty(M)
    _round_to_8_bits(x_ND, 1 / balance_D, x_int_ND, x_scale_N)
    _round_to_8_bits(W_MD, balance_D, W_int_MD, W_scale_M)
    return Rounded(x_int_ND, 1 / x_scale_N, W_int_MD.t(), W_scale_M)


def _mean_square(rows_RD: Tensor) -> Tensor:
    """Estimate the mean square of each dimension, from a sample of the rows if there are many."""
    return rows_RD[:: max(1, len(rows_RD) // SAMPLED_ROWS)].square().mean(0)


def _round_to_8_bits(rows_RD: Tensor, factor_D: Tensor, out_RD: Tensor, scale_R: Tensor) -> None:
    """Round `rows · factor` to 8 bits into `out_RD`, and write each row's scale into `scale_R`."""
    count = max(1, CHUNK_BYTES // 2 // (4 * max(1, rows_RD.shape[1])))  # rows that fit in the cache
    for some in pieces(len(rows_RD), count, rows_RD.device):
        scaled_rD = rows_RD[some] * factor_D
        scale_R[some] = scaled_rD.abs().amax(1).div_(INT8).clamp_min_(LEAST_SCALE)
        out_RD[some] = scaled_rD.mul_(1 / scale_R[some, None]).round_()
