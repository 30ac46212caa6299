"""Adam as a Triton kernel, which projects, steps and renormalizes a row while it is in registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit.sae.kernels import eager

FLAT = 1024
"""Elements per program for parameters whose rows are not kept at norm 1."""
OPTIONS = {"enable_fp_fusion": True}
"""Fuse multiplications and additions, which then round once. Set explicitly, because Triton's default varies between
releases and 3.9 warns without it."""

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with its first argument's device as the current one, which is where Triton launches kernels."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return function(*args, **kwargs)

    return wrapped


@triton.jit
def _rounded(values, noise, odds):
    """Round as `eager.round_stochastically` does, bit for bit."""
    bits = values.to(tl.int32, bitcast=True)
    mixed = (noise.to(tl.int32, bitcast=True) ^ bits) * -1640531535 + odds
    mixed = (mixed ^ (mixed >> 15)) * -2048144789
    return ((bits + ((mixed >> 16) & 0xFFFF)) & -65536).to(tl.float32, bitcast=True)


# The numbers that change from step to step are read from memory. So nothing is compiled in the middle of a run, and a
# replayed CUDA graph sees the new numbers.
@triton.jit
def adam_rows(
    p_ptr,
    g_ptr,
    first_ptr,
    second_ptr,
    numbers_ptr,
    width,
    size,
    beta1,
    beta2,
    eps,
    tiny,
    STEP_SIZE: tl.constexpr,
    ROOT: tl.constexpr,
    ODDS: tl.constexpr,
    UNIT_ROWS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step one row per program."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * width + column
    mask = (column < width) & (at < size)
    # Load everything before the first sum over the row, which waits for all threads.
    p = tl.load(p_ptr + at, mask=mask, other=0.0)
    g = tl.load(g_ptr + at, mask=mask, other=0.0)
    first = tl.load(first_ptr + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + at, mask=mask, other=0.0).to(tl.float32)
    step_size = tl.load(numbers_ptr + STEP_SIZE).to(tl.float32)
    root = tl.load(numbers_ptr + ROOT).to(tl.float32)
    if UNIT_ROWS:
        norm = tl.maximum(tl.sqrt(tl.sum(p * p)), tiny)
        unit = p / norm
        g -= tl.sum(g * unit) * unit
    first = beta1 * first + (1 - beta1) * g
    second = beta2 * second + (1 - beta2) * g * g
    p -= step_size * first / (tl.sqrt(second) / root + eps)
    if UNIT_ROWS:
        p /= tl.maximum(tl.sqrt(tl.sum(p * p)), tiny)
    tl.store(p_ptr + at, p, mask=mask)
    tl.store(first_ptr + at, first.to(first_ptr.dtype.element_ty), mask=mask)
    if HALF:
        second = _rounded(second, g, tl.load(numbers_ptr + ODDS).to(tl.int32))
    tl.store(second_ptr + at, second.to(second_ptr.dtype.element_ty), mask=mask)


@torch.no_grad()
@on_its_device
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
    """Compute `eager.adam_` for a float32 parameter, reading and writing each number once. `grad` is not changed."""
    if param.numel() == 0:
        return
    width = param.shape[1] if unit_rows else FLAT
    block = triton.next_power_of_2(width)
    adam_rows[(triton.cdiv(param.numel(), width),)](
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        numbers,
        width,
        param.numel(),
        beta1,
        beta2,
        eps,
        torch.finfo(torch.float32).tiny,
        STEP_SIZE=eager.STEP_SIZE,
        ROOT=eager.ROOT,
        ODDS=eager.ODDS,
        UNIT_ROWS=unit_rows,
        HALF=exp_avg_sq.dtype == torch.bfloat16,
        BLOCK=block,
        num_warps=min(32, max(4, block // 512)),  # 16 numbers per thread, of each of four tensors
        **OPTIONS,
    )
