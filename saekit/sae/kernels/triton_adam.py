"""Adam as a Triton kernel: projection, step and renormalisation of a row while it is in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FLAT = 1024
"""Elements per program where rows do not matter."""


@triton.jit
def _rounded(values, noise, step_bits):
    """See `eager.round_stochastically`: bit for bit the same."""
    bits = values.to(tl.int32, bitcast=True)
    mixed = (noise.to(tl.int32, bitcast=True) ^ bits) * -1640531535 + step_bits
    mixed = (mixed ^ (mixed >> 15)) * -2048144789
    return ((bits + ((mixed >> 16) & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def adam_rows(
    p_ptr,
    g_ptr,
    first_ptr,
    second_ptr,
    width,
    size,
    rate,
    root_of_second,
    beta1,
    beta2,
    eps,
    tiny,
    step_bits,
    UNIT_ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * width + column
    mask = (column < width) & (at < size)
    p = tl.load(p_ptr + at, mask=mask, other=0.0)
    g = tl.load(g_ptr + at, mask=mask, other=0.0)
    if UNIT_ROWS:
        norm = tl.maximum(tl.sqrt(tl.sum(p * p)), tiny)
        unit = p / norm
        g -= tl.sum(g * unit) * unit
    first = beta1 * tl.load(first_ptr + at, mask=mask, other=0.0).to(tl.float32) + (1 - beta1) * g
    second = beta2 * tl.load(second_ptr + at, mask=mask, other=0.0).to(tl.float32) + (1 - beta2) * g * g
    p -= rate * first / (tl.sqrt(second) / root_of_second + eps)
    if UNIT_ROWS:
        p /= tl.maximum(tl.sqrt(tl.sum(p * p)), tiny)
    tl.store(p_ptr + at, p, mask=mask)
    tl.store(first_ptr + at, first.to(first_ptr.dtype.element_ty), mask=mask)
    if HALF:
        second = _rounded(second, g, step_bits)
    tl.store(second_ptr + at, second.to(second_ptr.dtype.element_ty), mask=mask)


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
    """As `eager.adam_`, for a float32 parameter: every number is read once and written once. `grad` is only read."""
    if param.numel() == 0:
        return
    width = param.shape[1] if unit_rows else FLAT
    adam_rows[(triton.cdiv(param.numel(), width),)](
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        width,
        param.numel(),
        lr / (1 - beta1**step),
        (1 - beta2**step) ** 0.5,
        beta1,
        beta2,
        eps,
        torch.finfo(torch.float32).tiny,
        step * 747796405 % 2**31,
        UNIT_ROWS=unit_rows,
        HALF=exp_avg_sq.dtype == torch.bfloat16,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8 if width > 2048 else 4,
    )
