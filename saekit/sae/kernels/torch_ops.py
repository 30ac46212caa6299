"""The sparse operations out of what torch offers: the backend `cpu`, and what a GPU without Triton falls back to."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam as adam_of_torch

from saekit.sae.kernels.eager import from_parts, round_stochastically, row_norms

CHUNK_BYTES = 8 * 2**20
"""Scores are made for so many tokens at a time that they stay in a CPU's last-level cache until the top-k read them."""
SHARED_FROM = 2**15
"""Numbers below which torch's `topk` leaves all of them to one thread; a chunk has twice as many for its last stage."""
MOST_CHUNK_BYTES = 8 * CHUNK_BYTES
"""What a chunk may take for that."""

GROUP = 4
"""Scores per group; 8 is as good where there are many latents, and worse where there are few."""
ADAM_BYTES = 4 * 2**20
"""Adam steps so much of a parameter at a time, so that what is read for the projection is still in the cache."""
ROWS = 256
"""Rows of bfloat16 in a chunk are a multiple of these: a matmul of 341 rows takes what one of 448 does (AMX)."""
COLUMNS = 32
"""Columns of bfloat16 that a matmul takes at once (AMX): a row is filled up to a multiple of them."""
INT8 = 127
"""The largest magnitude of a number in 8 bits; -128 is left out, so that signs are alike."""
SAMPLED_ROWS = 1024
"""As many at least, if there are so many, say how large a dimension is."""
LEAST_SCALE = 1e-30
"""Of a row of zeros; a bias can still be divided by it in float32."""


def topk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, dtype: torch.dtype, in_order: bool = True, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """The `k` largest scores `x Wᵀ + b` of each token, computed in `dtype`, largest first if `in_order`.

    With `parts` it is the `k / parts` largest of each of so many equal parts of the latents, part by part.
    The `[N, M]` scores never exist at once: chunks of tokens share one buffer.

    Returns:
        Scores `[N, K]` (in `dtype`; for int8 float32, and in a unit of each token's own) and latents `[N, K]`, int64.
    """
    N, M = x_ND.shape[0], W_MD.shape[0]
    bytes_per_token = 2 * 4 * M if dtype == torch.int8 else dtype.itemsize * M
    rows = max(CHUNK_BYTES // bytes_per_token, 2 * SHARED_FROM // (GROUP * max(1, k)))
    if dtype == torch.bfloat16:
        rows = -(-rows // ROWS) * ROWS
    rows = max(1, min(rows, MOST_CHUNK_BYTES // bytes_per_token, N))
    if dtype == torch.int8:
        scores_of = _scores_in_8_bits(x_ND, W_MD, b_M, rows)
    elif dtype == torch.bfloat16 != x_ND.dtype:
        scores_of = _scores_in_bfloat16(x_ND, W_MD, b_M, rows)
    else:
        scores_of = _scores(x_ND.to(dtype), W_MD.to(dtype), b_M.to(dtype), rows)
    by_bits = dtype == torch.bfloat16 and x_ND.device.type == "cpu"
    values_NK = x_ND.new_empty(N, k, dtype=torch.float32 if dtype == torch.int8 else dtype)
    indices_NK = torch.empty(N, k, dtype=torch.int64, device=x_ND.device)
    for start in range(0, N, rows):
        some = slice(start, min(start + rows, N))
        scores_nM = scores_of(some)
        # What is not a number is the largest to numbers, and may be the least to integers. In weights it meets every
        # token, so that one tells; in a token it is in all scores, and so in those that were chosen.
        topk_of = topk_of_bits if by_bits and not scores_nM[0].isnan().any() else topk_of_groups
        scores_nPm = scores_nM.unflatten(1, (parts, M // parts))
        values, within = topk_of(scores_nPm.flatten(0, 1), k // parts, in_order)
        values_NK[some] = values.view(-1, k)
        indices_NK[some] = from_parts(within.view(-1, parts, k // parts), M).flatten(1)
    return values_NK, indices_NK


def _scores(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """From at most `rows` tokens to their scores `[n, M]`; the next call overwrites them."""
    buffer, W_DM = x_ND.new_empty(rows, W_MD.shape[0]), W_MD.t()

    def scores_of(some: slice) -> Tensor:
        x_nD = x_ND[some]
        # A bias added in place costs half of what `addmm` takes for it.
        return torch.mm(x_nD, W_DM, out=buffer[: len(x_nD)]).add_(b_M)

    return scores_of


def _scores_in_bfloat16(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """As `_scores`, in bfloat16.

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


def _scores_in_8_bits(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int) -> Callable[[slice], Tensor]:
    """As `_scores`, from 8-bit integers, with a scale per token and per latent; in a unit of each token's own.

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
    W_int_DM, one_over_x_N1 = W_int_MD.t(), 1 / x_scale_N[:, None]
    buffer = x_ND.new_empty(rows, M, dtype=torch.float32)
    # Each call packs the weights it is given anew, so tiles are as long as a chunk, and as wide as the cache allows
    # for their sums to be there still when they are scaled.
    width = max(1, min(M, CHUNK_BYTES // (8 * rows)))
    sums = x_ND.new_empty(rows * width, dtype=torch.int32)

    def scores_of(some: slice) -> Tensor:
        x_int_nD, one_over_x_n1 = x_int_ND[some], one_over_x_N1[some]
        n = len(x_int_nD)
        for start in range(0, M, width):
            part = slice(start, min(start + width, M))
            sums_nm = sums[: n * (part.stop - start)].view(n, -1)
            torch._int_mm(x_int_nD, W_int_DM[:, part], out=sums_nm)
            # All divided by the token's scale, which changes no order within it: so only the bias needs a division.
            buffer[:n, part].copy_(sums_nm).mul_(W_scale_M[part]).addcmul_(one_over_x_n1, b_M[part])
        return buffer[:n]

    return scores_of


def _mean_square(rows_RD: Tensor) -> Tensor:
    """Of each dimension, about: from a part of the rows if there are many."""
    return rows_RD[:: max(1, len(rows_RD) // SAMPLED_ROWS)].square().mean(0)


def _round_to_8_bits(rows_RD: Tensor, factor_D: Tensor, out_RD: Tensor, scale_R: Tensor) -> None:
    """`rows · factor` in 8 bits into `out_RD`, and what each row is to be multiplied by again into `scale_R`."""
    count = max(1, CHUNK_BYTES // 2 // (4 * max(1, rows_RD.shape[1])))  # of rows, that stay in the cache
    for start in range(0, len(rows_RD), count):
        some = slice(start, start + count)
        scaled_rD = rows_RD[some] * factor_D
        scale_R[some] = scaled_rD.abs().amax(1).div_(INT8).clamp_min_(LEAST_SCALE)
        out_RD[some] = scaled_rD.mul_(1 / scale_R[some, None]).round_()


def topk_of_groups(scores_NM: Tensor, k: int, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """As `scores.topk(k)`, largest first if `in_order`, in about half the time on a CPU where `k` is small beside M.

    The k largest numbers lie in the k groups whose maxima are largest, so those groups are found first, in the same
    way, and then only their members are compared. Among equal numbers another may be chosen than by `topk`.
    """
    N, M = scores_NM.shape
    groups = M // GROUP
    if M % GROUP or groups < GROUP * k:
        return scores_NM.topk(k, dim=-1, sorted=in_order)
    members_NGg = scores_NM.view(N, GROUP, groups)  # a group's members are far apart, so that the maximum is vectorised
    _, best_NK = topk_of_groups(members_NGg.amax(1), k, in_order=False)
    candidates = members_NGg.gather(2, best_NK[:, None].expand(N, GROUP, k)).view(N, GROUP * k)
    values_NK, at_NK = candidates.topk(k, dim=-1, sorted=in_order)
    row_NK = at_NK.div(k, rounding_mode="floor")
    return values_NK, row_NK * groups + best_NK.gather(1, at_NK - row_NK * k)


def topk_of_bits(scores_NM: Tensor, k: int, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """As `topk_of_groups`, of bfloat16 numbers whose bits are compared as integers, which takes two thirds of the time.

    Those of positive numbers are in the numbers' order and above those of all others; where others were chosen, the
    numbers themselves are compared.
    """
    bits_NK, indices_NK = topk_of_groups(scores_NM.view(torch.int16), k, in_order)
    values_NK = bits_NK.view(scores_NM.dtype)
    others_N = (bits_NK < 0).any(1)
    if others_N.any():
        values_NK[others_N], indices_NK[others_N] = topk_of_groups(scores_NM[others_N], k, in_order)
    return values_NK, indices_NK


def gather_dot(x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
    """`out[n, k] = ⟨x[n], W[indices[n, k]]⟩`: `[N, K]`, without an `[N, K, D]` tensor."""
    N, K = indices_NK.shape
    if N * K == 0:
        return x_ND.new_zeros(N, K)
    starts = torch.arange(0, N * K + 1, K, device=x_ND.device)
    zeros = x_ND.new_zeros(N * K)
    with warnings.catch_warnings():  # torch calls its CSR tensors beta, once per process
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)  # torch 2.11
        pattern = torch.sparse_csr_tensor(
            starts, indices_NK.flatten(), zeros, (N, W_MD.shape[0]), check_invariants=False
        )
        return torch.sparse.sampled_addmm(pattern, x_ND, W_MD.t()).values().view(N, K)


def gather_sum(weights_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
    """`out[n] = Σ_k weights[n, k] · W[indices[n, k]]`: `[N, D]`."""
    if indices_NK.numel() == 0:  # an empty chunk of tokens, or k = 0: the bag refuses both
        return W_MD.new_zeros(indices_NK.shape[0], W_MD.shape[1])
    return F.embedding_bag(indices_NK, W_MD, per_sample_weights=weights_NK, mode="sum")


def segment_sum(weights_P: Tensor, tokens_P: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
    """`out[m] = Σ_p weights[p] · rows[tokens[p]]` over the pairs of latent m: `[M, D]`.

    Args:
        weights_P: `[P]`, one per pair (latent, token), sorted by latent.
        tokens_P: `[P]`, int64.
        starts_M: `[M + 1]`, int64: where each latent's pairs begin, and where the last one's end.
        rows_ND: `[N, D]`.
    """
    if len(tokens_P) == 0:
        return rows_ND.new_zeros(len(starts_M) - 1, rows_ND.shape[1])
    return F.embedding_bag(
        tokens_P, rows_ND, starts_M, per_sample_weights=weights_P, mode="sum", include_last_offset=True
    )


@torch.no_grad()
def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """As `eager.adam_`, in one pass over memory: block by block of rows, project, step, renormalise."""
    width = param[0].numel() if param.ndim > 1 else 1
    rows = max(1, ADAM_BYTES // (width * param.element_size())) if param.device.type == "cpu" else len(param)
    for p, g, first, second in zip(*(each.split(rows) for each in (param, grad, exp_avg, exp_avg_sq)), strict=True):
        if unit_rows:
            norms = row_norms(p)  # of a zero row so small that its square would be zero
            along = (g * p).sum(1, keepdim=True)  # half of what `einsum` takes; the products stay in the cache
            g.addcmul_(p, along / norms / norms, value=-1)
        first_moment, second_moment = first.to(p.dtype), second.to(p.dtype)  # the same tensors where they are float32
        adam_of_torch(
            [p],
            [g],
            [first_moment],
            [second_moment],
            [],
            [torch.tensor(float(step - 1), device=p.device)],  # torch counts the step itself
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=0.0,
            eps=eps,
            maximize=False,
        )
        if unit_rows:
            p.div_(row_norms(p))
        if first.dtype != p.dtype:
            first.copy_(first_moment)
            second.copy_(round_stochastically(second_moment, g, step))
