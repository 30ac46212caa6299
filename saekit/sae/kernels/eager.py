"""The oracle: encode, decode and Adam as the formulas say them, differentiated by autograd. Slow and obvious."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STEP_SIZE, CORRECTION, ROOT, ODDS, RATE, STEPS_BEFORE = range(6)
"""Where `adam_numbers` puts what. `native_rows.h` has the same order."""


def encode_topk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, *, centre_D: Tensor | None = None, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the `k` largest values of `ReLU((x − centre) Wᵀ + b)` per token, largest first.

    With `parts`, the latents are in that many equal parts, in order, and it is the `k / parts` largest of each,
    part by part. With as many parts as `k` that is GroupMax.

    Args:
        x_ND: `[N, D]`, one row per token.
        W_MD: `[M, D]`, one row per latent.
        b_M: `[M]`.
        k: How many latents to keep, at most `M`.
        centre_D: `[D]`, what is subtracted from `x`: the decoder's bias.
        parts: A divisor of both `k` and M.

    Returns:
        Values `[N, K]` (zero where fewer than `k` latents are positive) and their latents' numbers `[N, K]`, int64.
    """
    if centre_D is not None:
        x_ND = x_ND - centre_D
    scores_NM = F.relu(F.linear(x_ND, W_MD, b_M))
    return topk_in_parts(scores_NM, k, parts)


def topk_in_parts(scores_NM: Tensor, k: int, parts: int) -> tuple[Tensor, Tensor]:
    """The `k / parts` largest of each of `parts` equal parts of the columns: values and column numbers, `[N, K]`."""
    acts_NPk, within_NPk = scores_NM.unflatten(1, (parts, -1)).topk(k // parts, dim=-1, sorted=True)
    return acts_NPk.flatten(1), from_parts(within_NPk, scores_NM.shape[1]).flatten(1)


def from_parts(within_NPk: Tensor, num_columns: int) -> Tensor:
    """Column numbers, from numbers within each of P equal parts of the columns, `[N, P, k]`."""
    parts = within_NPk.shape[1]
    return within_NPk + torch.arange(parts, device=within_NPk.device)[:, None] * (num_columns // parts)


def decode(acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
    """Return the sum of `acts[n, k] * W[indices[n, k]]` over `k`: `[N, D]`, without the decoder's bias."""
    return (acts_NK.unsqueeze(-1) * W_MD[indices_NK]).sum(dim=1)


def keep_above(acts_NK: Tensor, threshold: Tensor | None) -> Tensor:
    """Return the values above a threshold, and exactly zero, without a gradient, in place of the others.

    NaN stays, so that it is noticed. The threshold is 0-dimensional, of any float type; it is compared in the values'
    type. None leaves all values as they are.
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
    """`encode_topk` of `x − centre`, then `decode`: the sum of rows `[N, D]`, values `[N, K]` and latents `[N, K]`.

    With a threshold, `keep_above` stands between the two.
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
    """`autoencode`, with a sum of rows for each prefix of the dictionary: of the chosen latents below it alone.

    Args:
        x_ND: As for `autoencode`, like the four behind it.
        W_enc_MD: `[M, D]`.
        b_enc_M: `[M]`.
        W_dec_MD: `[M, D]`.
        centre_D: `[D]`.
        k: How many of the M latents are active.
        prefixes: Numbers of latents, ascending, the last one M.
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
    """Compute what changes from step to step in `adam_`, which reads it from a float64 tensor `[6]`.

    Args:
        step: Number of this step, from 1.
        lr: Learning rate.
        beta1: Decay of the first moment per step.
        beta2: Decay of the second.

    Returns:
        By position: `STEP_SIZE`, the learning rate over the first moment's correction `1 − β₁^step`; `CORRECTION`, the
        second moment's, `1 − β₂^step`; `ROOT`, its square root; `ODDS`, an integer for `round_stochastically`; `RATE`,
        the learning rate; `STEPS_BEFORE`, the number of steps before this one.
    """
    correction = 1 - beta2**step
    return lr / (1 - beta1**step), correction, correction**0.5, odds_of_step(step), lr, step - 1


def odds_of_step(step: int) -> int:
    """Return the 31 bits of a step from which `round_stochastically` draws its numbers."""
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
    """One step of Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), in place; `grad` is used up.

    Args:
        param: Of any shape.
        grad: Of the same shape and type.
        exp_avg: The first moment, float32 or bfloat16.
        exp_avg_sq: The second moment; in bfloat16 it is rounded by `round_stochastically`.
        numbers: What `adam_numbers` gives for this step, `[6]`, float64, on the parameter's device.
        beta1: Decay of the first moment per step.
        beta2: Decay of the second.
        eps: What is added to the root of the second.
        unit_rows: Whether `param` is a matrix whose rows are kept at norm 1. Then the part of the gradient parallel
            to each row is left out: renormalizing would undo a step along the row anyway, but that part would still
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
    """float32 values rounded to bfloat16, up or down with odds that make the rounding's mean error zero.

    A second moment moves by a thousandth of itself per step, which rounding to nearest (to 8 bits) would undo every
    time: it would stand still. The odds come from mixing bits of other numbers, so that a resumed run rounds alike.

    Args:
        values: float32, not negative.
        noise: float32 of the same shape: numbers whose low bits are as good as random.
        odds: `odds_of_step` as a scalar, int32. It makes the bits differ from step to step where `noise` does not.
    """
    mixed = (noise.view(torch.int32) ^ values.view(torch.int32)) * -1640531535 + odds
    mixed = (mixed ^ (mixed >> 15)) * -2048144789  # rounds of integer hashing: products carry low bits upwards
    bits = values.view(torch.int32) + (mixed >> 16 & 0xFFFF)
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


def row_norms(W_MD: Tensor) -> Tensor:
    """Norms of the rows, `[M, 1]`, at least the smallest normal number, so that they can be divided by."""
    return W_MD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_MD.dtype).tiny)


def unit_rows(W_MD: Tensor) -> Tensor:
    """`W` with every row scaled to norm 1; a zero row stays zero."""
    return W_MD / row_norms(W_MD)
