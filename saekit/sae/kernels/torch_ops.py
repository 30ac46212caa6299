"""The sparse operations out of what torch offers: the backend `cpu`, and what a GPU without Triton falls back to."""

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
"""Adam steps so much of a parameter at a time, so that what is read for the projection is still in the cache."""


def topk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, dtype: torch.dtype, in_order: bool = True, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the `k` largest scores `x Wᵀ + b` of each token, computed in `dtype`, largest first if `in_order`.

    With `parts` it is the `k / parts` largest of each of that many equal parts of the latents, part by part.
    The `[N, M]` scores never exist at once: chunks of tokens share one buffer.

    Returns:
        Scores `[N, K]` (in `dtype`; for int8 float32, and in a unit of each token's own) and latents `[N, K]`, int64.
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
        # What is not a number is the largest to numbers, and may be the least to integers. In weights it meets every
        # token, so that one tells; in a token it is in all scores, and so in those that were chosen.
        topk_of = topk_of_bits if by_bits and not scores_nM[0].isnan().any() else topk_of_groups
        scores_nPm = scores_nM.unflatten(1, (parts, M // parts))
        values, within = topk_of(scores_nPm.flatten(0, 1), k // parts, in_order)
        values_NK[some] = values.view(-1, k)
        indices_NK[some] = from_parts(within.view(-1, parts, k // parts), M).flatten(1)
    return values_NK, indices_NK


def topk_of_groups(scores_NM: Tensor, k: int, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """As `scores.topk(k)`, largest first if `in_order`, in about half the time on a CPU if `k` is much smaller than M.

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


def best_of(scores_NC: Tensor, latents_NC: Tensor, k: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Of a few scores of each token the k largest, largest first, and their latents; both `[N, K]`.

    With `parts` it is the `k / parts` largest of each of that many equal parts of them, part by part.
    """
    values_NK, order_NK = topk_in_parts(scores_NC, k, parts)
    return values_NK, latents_NC.gather(1, order_NK)


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


def sort_pairs(indices_NK: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs (latent, token) of a k-sparse code in the order of latents, and of tokens within a latent.

    Returns:
        Where in the flat `indices` each of them is, and its token, both `[N·K]`; and `[M + 1]`, where each latent's
        begin and the last one's end. All int64.
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
    """As `eager.adam_`, in one pass over memory: block by block of rows, project, step, renormalize.

    A gradient of `RowSums` is summed first.
    """
    grad = segment_sum(*grad) if isinstance(grad, RowSums) else grad
    width = param[0].numel() if param.ndim > 1 else 1
    on_cpu = param.device.type == "cpu"
    rows = max(1, ADAM_BYTES // (width * param.element_size())) if on_cpu else len(param)
    # torch's kernel for CPUs reads a rate of any type, as a double; the one for CUDA takes it for float32 unseen.
    lr = numbers[RATE] if on_cpu else numbers[RATE].float()
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
            [numbers[STEPS_BEFORE].float()],  # torch counts the step itself, in this tensor
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
