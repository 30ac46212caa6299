"""The reference: encode, decode and Adam straight from their formulas, differentiated by autograd. Slow and obvious."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEP_SIZE, CORRECTION, ROOT, ODDS, RATE, STEPS_BEFORE = range(6)
"""Positions in the result of `adam_numbers`. `native_rows.h` uses the same order."""


def encode_topk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, *, centre_D: Tensor | None = None, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the `k` largest values of `ReLU((x − centre) Wᵀ + b)` per token, largest first.

    With `parts`, split the latents, in order, into this many equal parts, and return the `k / parts` largest of each,
    part by part. With `k` parts this is GroupMax.

    Args:
        x_ND: `[N, D]`, one row per token.
        W_MD: `[M, D]`, one row per latent.
        b_M: `[M]`.
        k: How many latents to keep, at most M.
        centre_D: `[D]`, subtracted from `x`: the decoder's bias.
        parts: A divisor of both `k` and M.

    Returns:
        Values `[N, K]` (zeros if fewer than `k` latents are positive) and indices of the latents `[N, K]`, int64.
    """
    if centre_D is not None:
        x_ND = x_ND - centre_D
    scores_NM = F.relu(F.linear(x_ND, W_MD, b_M))
    return topk_in_parts(scores_NM, k, parts)


def topk_in_parts(scores_NM: Tensor, k: int, parts: int) -> tuple[Tensor, Tensor]:
    """Return the `k / parts` largest of each of `parts` equal parts of the columns: values and indices, `[N, K]`."""
    acts_NPk, within_NPk = scores_NM.unflatten(1, (parts, -1)).topk(k // parts, dim=-1, sorted=True)
    return acts_NPk.flatten(1), from_parts(within_NPk, scores_NM.shape[1]).flatten(1)


def from_parts(within_NPk: Tensor, num_columns: int) -> Tensor:
    """Convert indices within each of P equal parts of the columns, `[N, P, k]`, to indices of columns."""
    parts = within_NPk.shape[1]
    return within_NPk + torch.arange(parts, device=within_NPk.device)[:, None] * (num_columns // parts)


def decode(acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
    """Return the sum of `acts[n, k] * W[indices[n, k]]` over `k`, `[N, D]`, without the decoder's bias."""
    return (acts_NK.unsqueeze(-1) * W_MD[indices_NK]).sum(dim=1)


def keep_above(acts_NK: Tensor, threshold: Tensor | None) -> Tensor:
    """Keep the values above a threshold and set the others to zero, without a gradient.

    NaN stays, so that it is noticed. The threshold is 0-dimensional, of any float type, and is compared in the values'
    type. None keeps all values.
    """
    return acts_NK if threshold is None else acts_NK.masked_fill(acts_NK <= threshold, 0.0)


def autoencode(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    W_dec_MD: Tensor,
    centre_D: Tensor | None,
    k: int,
    threshold: Tensor | None = None,
    parts: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply `encode_topk`, then `decode`: return the sums of rows `[N, D]`, values `[N, K]` and latents `[N, K]`.

    With a threshold, apply `keep_above` in between.
    """
    acts_NK, indices_NK = encode_topk(x_ND, W_enc_MD, b_enc_M, k, centre_D=centre_D, parts=parts)
    acts_NK = keep_above(acts_NK, threshold)
    return decode(acts_NK, indices_NK, W_dec_MD), acts_NK, indices_NK


def autoencode_nested(
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
    """Compute `autoencode` with a sum of rows for each prefix of the dictionary, from the chosen latents in it.

    Args:
        x_ND: `[N, D]`.
        W_enc_MD: `[M, D]`.
        b_enc_M: `[M]`.
        W_dec_MD: `[M, D]`.
        centre_D: `[D]`.
        k: How many of the M latents are active.
        prefixes: Sizes of the prefixes, ascending. The last one is M.
        threshold: See `keep_above`.
        parts: See `encode_topk`.

    Returns:
        The sums `[G, N, D]`, values `[N, K]` and latents `[N, K]`.
    """
    acts_NK, indices_NK = encode_topk(x_ND, W_enc_MD, b_enc_M, k, centre_D=centre_D, parts=parts)
    acts_NK = keep_above(acts_NK, threshold)
    rows = [decode(acts_NK * (indices_NK < prefix), indices_NK, W_dec_MD) for prefix in prefixes]
    return torch.stack(rows), acts_NK, indices_NK


def adam_numbers(step: int, lr: float, beta1: float, beta2: float) -> tuple[float, ...]:
    """Compute the numbers that change from step to step. `adam_` reads them from a float64 tensor `[6]`.

    Args:
        step: Number of this step, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment per step.
        beta2: Decay of the second moment per step.

    Returns:
        By position: `STEP_SIZE`, the learning rate divided by the first moment's bias correction, `1 − β₁^step`;
        `CORRECTION`, the second moment's, `1 − β₂^step`; `ROOT`, its square root; `ODDS`, an integer for
        `round_stochastically`; `RATE`, the learning rate; `STEPS_BEFORE`, the number of steps before this one.
    """
    correction = 1 - beta2**step
    return lr / (1 - beta1**step), correction, correction**0.5, odds_of_step(step), lr, step - 1


def odds_of_step(step: int) -> int:
    """Return 31 bits that make `round_stochastically` differ from step to step."""
    return step * 747796405 % 2**31


@torch.no_grad()
def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    numbers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    unit_rows: bool,
) -> None:
    """Make one step of Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) in place, and overwrite `grad`.

    Args:
        param: The parameter, of any shape.
        grad: Its gradient, of the same shape and type.
        exp_avg: The first moment, float32 or bfloat16.
        exp_avg_sq: The second moment, float32 or bfloat16. `round_stochastically` rounds it to bfloat16.
        numbers: The result of `adam_numbers` for this step: `[6]`, float64, on the parameter's device.
        beta1: Decay of the first moment per step.
        beta2: Decay of the second moment per step.
        eps: Added to the root of the second moment.
        unit_rows: Whether `param` is a matrix whose rows are kept at norm 1. If so, the gradient's component parallel
            to each row is removed. Renormalizing undoes a step along the row anyway, but that component would still
            enter the moments (Bricken et al. 2023, "Towards Monosemanticity"; Gao et al. 2024 do the same).
    """
    if unit_rows:
        unit_MD = param / row_norms(param)
        grad -= (grad * unit_MD).sum(dim=1, keepdim=True) * unit_MD
    first = beta1 * exp_avg.to(param.dtype) + (1 - beta1) * grad
    second = beta2 * exp_avg_sq.to(param.dtype) + (1 - beta2) * grad.square()
    step_size, correction = numbers[STEP_SIZE].to(param.dtype), numbers[CORRECTION].to(param.dtype)
    denominator = (second / correction).sqrt() + eps
    param -= step_size * first / denominator
    if unit_rows:
        param /= row_norms(param)
    exp_avg.copy_(first)
    in_bfloat16 = exp_avg_sq.dtype == torch.bfloat16
    exp_avg_sq.copy_(round_stochastically(second, grad, numbers[ODDS].to(torch.int32)) if in_bfloat16 else second)


def round_stochastically(values: Tensor, noise: Tensor, odds: Tensor) -> Tensor:
    """Round float32 values to bfloat16, up or down at random such that the mean error is zero.

    A second moment changes by about a thousandth per step. Rounding to nearest (to 8 bits) would undo every change. The
    random bits are a hash of the arguments, so that a resumed run rounds the same way.

    Args:
        values: float32, not negative.
        noise: float32 of the same shape: numbers whose low bits are practically random.
        odds: `odds_of_step` as a scalar, int32. It makes the bits differ from step to step if `noise` does not.
    """
    mixed = (noise.view(torch.int32) ^ values.view(torch.int32)) * -1640531535 + odds
    mixed = (mixed ^ (mixed >> 15)) * -2048144789  # integer hashing: products carry low bits upwards
    bits = values.view(torch.int32) + (mixed >> 16 & 0xFFFF)
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


def row_norms(W_MD: Tensor) -> Tensor:
    """Return the norms of the rows, `[M, 1]`, but at least the smallest normal number, to avoid division by zero."""
    return W_MD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_MD.dtype).tiny)


def unit_rows(W_MD: Tensor) -> Tensor:
    """Return `W` with every row scaled to norm 1. A zero row stays zero."""
    return W_MD / row_norms(W_MD)
