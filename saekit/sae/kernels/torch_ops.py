"""The sparse operations, written with torch's: the backend `cpu`, also used on a GPU without Triton."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam as adam_of_torch

from saekit.sae.kernels import scores
from saekit.sae.kernels.eager import (
    ODDS,
    RATE,
    STEPS_BEFORE,
    from_parts,
    round_stochastically,
    row_norms,
    topk_in_parts,
)
from saekit.sae.kernels.row_sums import RowSums
from saekit.sae.kernels.scores import GROUP

ADAM_BYTES = 4 * 2**20
"""Bytes of a parameter that Adam processes at a time, so that they stay in the cache after the projection."""


def topk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, dtype: torch.dtype, in_order: bool = True, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the `k` largest scores `x Wᵀ + b` of each token, computed in `dtype`, largest first if `in_order`.

    With several parts, return the `k / parts` largest of each of `parts` equal parts of the latents, part by part. The
    `[N, M]` scores never exist all at once: chunks of tokens share one buffer.

    Returns:
        Scores `[N, K]` in `dtype`, and latents `[N, K]`, int64. For int8, scores are float32 and each token's are
        divided by a scale of its own.
    """
    N, M = x_ND.shape[0], W_MD.shape[0]
    rows = scores.chunk_rows(N, M, k, dtype, bytes_per_score=2 * 4 if dtype == torch.int8 else dtype.itemsize)
    if dtype == torch.int8:
        scores_of = scores.in_8_bits(x_ND, W_MD, b_M, rows)
    elif dtype == torch.bfloat16 != x_ND.dtype:
        scores_of = scores.in_bfloat16(x_ND, W_MD, b_M, rows)
    else:
        scores_of = scores.exact(x_ND.to(dtype), W_MD.to(dtype), b_M.to(dtype), rows)
    by_bits = dtype == torch.bfloat16 and x_ND.device.type == "cpu"
    values_NK = x_ND.new_empty(N, k, dtype=torch.float32 if dtype == torch.int8 else dtype)
    indices_NK = torch.empty(N, k, dtype=torch.int64, device=x_ND.device)
    for some in scores.pieces(N, rows, x_ND.device):
        scores_nM = scores_of(some)
        # NaN sorts as the largest number, but its bits may sort as the smallest integer. A NaN in the weights shows up
        # in every token, so checking one token is enough. A NaN in a token is in all its scores, so also in the chosen
        # ones.
        topk_of = topk_of_bits if by_bits and not scores_nM[0].isnan().any() else topk_of_groups
        scores_nPm = scores_nM.unflatten(1, (parts, M // parts))
        values, within = topk_of(scores_nPm.flatten(0, 1), k // parts, in_order)
        values_NK[some] = values.view(-1, k)
        indices_NK[some] = from_parts(within.view(-1, parts, k // parts), M).flatten(1)
    return values_NK, indices_NK


def topk_of_groups(scores_NM: Tensor, k: int, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """Compute `scores.topk(k)` in about half the time on a CPU, if `k` is much smaller than M. Sorted if `in_order`.

    The k largest numbers are in the k groups with the largest maxima. So find these groups first, recursively, and then
    compare only their members. Among equal numbers, the choice can differ from that of `topk`.
    """
    N, M = scores_NM.shape
    groups = M // GROUP
    if M % GROUP or groups < GROUP * k:
        return scores_NM.topk(k, dim=-1, sorted=in_order)
    members_NGg = scores_NM.view(N, GROUP, groups)  # a group's members are far apart, so that `amax` is vectorized
    _, best_NK = topk_of_groups(members_NGg.amax(1), k, in_order=False)
    candidates = members_NGg.gather(2, best_NK[:, None].expand(N, GROUP, k)).view(N, GROUP * k)
    values_NK, at_NK = candidates.topk(k, dim=-1, sorted=in_order)
    row_NK = at_NK.div(k, rounding_mode="floor")
    return values_NK, row_NK * groups + best_NK.gather(1, at_NK - row_NK * k)


def topk_of_bits(scores_NM: Tensor, k: int, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """Compute `topk_of_groups` for bfloat16 by comparing bits as integers, which takes two thirds of the time.

    For positive numbers, the bits have the same order as the numbers, and sort above all others. For tokens where other
    numbers were chosen, compare the numbers themselves.
    """
    bits_NK, indices_NK = topk_of_groups(scores_NM.view(torch.int16), k, in_order)
    values_NK = bits_NK.view(scores_NM.dtype)
    others_N = (bits_NK < 0).any(1)
    if others_N.any():
        values_NK[others_N], indices_NK[others_N] = topk_of_groups(scores_NM[others_N], k, in_order)
    return values_NK, indices_NK


def best_of(scores_NC: Tensor, latents_NC: Tensor, k: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Of a few scores of each token the k largest, largest first, and their latents; both `[N, K]`.

    With `parts` it is the `k / parts` largest of each of that many equal parts of them, part by part.
    """
    values_NK, order_NK = topk_in_parts(scores_NC, k, parts)
    return values_NK, latents_NC.gather(1, order_NK)


def gather_dot(x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
    """Compute `out[n, k] = ⟨x[n], W[indices[n, k]]⟩`, `[N, K]`, without an `[N, K, D]` tensor."""
    N, K = indices_NK.shape
    if N * K == 0:
        return x_ND.new_zeros(N, K)
    starts = torch.arange(0, N * K + 1, K, device=x_ND.device)
    zeros = x_ND.new_zeros(N * K)
    with warnings.catch_warnings():  # torch warns once per process that its CSR tensors are beta
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)  # torch 2.11
        pattern = torch.sparse_csr_tensor(
            starts, indices_NK.flatten(), zeros, (N, W_MD.shape[0]), check_invariants=False
        )
        return torch.sparse.sampled_addmm(pattern, x_ND, W_MD.t()).values().view(N, K)


def gather_sum(weights_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
    """Compute `out[n] = Σ_k weights[n, k] · W[indices[n, k]]`, `[N, D]`."""
    if indices_NK.numel() == 0:  # `embedding_bag` accepts neither an empty chunk of tokens nor k = 0
        return W_MD.new_zeros(indices_NK.shape[0], W_MD.shape[1])
    return F.embedding_bag(indices_NK, W_MD, per_sample_weights=weights_NK, mode="sum")


def segment_sum(weights_P: Tensor, tokens_P: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
    """Compute `out[m] = Σ_p weights[p] · rows[tokens[p]]` over the pairs of latent m, `[M, D]`.

    Args:
        weights_P: `[P]`, one per pair (latent, token), sorted by latent.
        tokens_P: `[P]`, int64: the pairs' tokens.
        starts_M: `[M + 1]`, int64: where each latent's pairs begin, and where the last latent's pairs end.
        rows_ND: `[N, D]`.
    """
    if len(tokens_P) == 0:
        return rows_ND.new_zeros(len(starts_M) - 1, rows_ND.shape[1])
    return F.embedding_bag(
        tokens_P, rows_ND, starts_M, per_sample_weights=weights_P, mode="sum", include_last_offset=True
    )


def sort_pairs(indices_NK: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the pairs (latent, token) of a k-sparse code by latent, and by token within a latent.

    Returns:
        Each pair's position in the flattened `indices`, and its token, both `[N·K]`. Then `[M + 1]`, where each
        latent's pairs begin and the last latent's pairs end. All int64.
    """
    latents, order = indices_NK.flatten().to(torch.int32).sort(stable=True)  # half the bytes to sort
    borders = torch.arange(num_latents + 1, dtype=torch.int32, device=latents.device)
    tokens = order.div(max(1, indices_NK.shape[1]), rounding_mode="floor")
    return order, tokens, torch.searchsorted(latents, borders)


@torch.no_grad()
def adam_(
    param: Tensor,
    grad: Tensor | RowSums,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    numbers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """Compute `eager.adam_` in one pass over memory: project, step and renormalize one block of rows at a time.

    A gradient of `RowSums` is summed first.
    """
    grad = segment_sum(*grad) if isinstance(grad, RowSums) else grad
    width = param[0].numel() if param.ndim > 1 else 1
    on_cpu = param.device.type == "cpu"
    rows = max(1, ADAM_BYTES // (width * param.element_size())) if on_cpu else len(param)
    # torch's CPU kernel reads a rate of any type as a double. The CUDA kernel assumes float32 without checking.
    lr = numbers[RATE] if on_cpu else numbers[RATE].float()
    for p, g, first, second in zip(*(each.split(rows) for each in (param, grad, exp_avg, exp_avg_sq)), strict=True):
        if unit_rows:
            norms = row_norms(p)  # divide by it twice: for a zero row its square would underflow to zero
            along = (g * p).sum(1, keepdim=True)  # takes half the time of `einsum`: the products stay in the cache
            g.addcmul_(p, along / norms / norms, value=-1)
        first_moment, second_moment = first.to(p.dtype), second.to(p.dtype)  # the same tensors if they are float32
        adam_of_torch(
            [p],
            [g],
            [first_moment],
            [second_moment],
            [],
            [numbers[STEPS_BEFORE].float()],  # torch adds 1 to this tensor
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
            second.copy_(round_stochastically(second_moment, g, numbers[ODDS].to(torch.int32)))
