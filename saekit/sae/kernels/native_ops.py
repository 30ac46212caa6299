"""The sparse operations in C++, compiled on this machine (`native.cpp`): the backend `native`.

It handles contiguous float32 tensors on a CPU, as in training, and moments in bfloat16. Everything else goes to
`torch_ops`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from saekit.sae.kernels import scores, torch_ops
from saekit.sae.kernels.native_build import library
from saekit.sae.kernels.row_sums import RowSums

DEVICES = ("cpu", "meta")
"""On the meta device nothing is computed, but allocations can be counted."""
AMX_TILE = 32
"""`native_amx.h` pads tokens, latents and dimensions to multiples of this number."""
FEW = 192
"""The most scores per part for which the native `best_of` is used. Above, torch's `topk` is as fast."""
TOPK = {torch.float32: "topk_float32", torch.bfloat16: "topk_bfloat16", torch.int8: "topk_int8"}


def topk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, dtype: torch.dtype, in_order: bool = True, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Compute `torch_ops.topk`, reading the scores of the matmul only once."""
    (N, D), M = x_ND.shape, len(W_MD)
    fit = W_MD.shape == (M, D) and b_M.shape == (M,) and 0 < k // parts <= M // parts
    if not (fit and _all_float32(x_ND, W_MD, b_M) and dtype in TOPK):
        return torch_ops.topk(x_ND, W_MD, b_M, k, dtype, in_order, parts)
    if dtype == torch.bfloat16 and parts == 1 and not x_ND.is_meta and has_amx():
        return _topk_with_amx(x_ND, W_MD, b_M, k, in_order)
    rows = scores.chunk_rows(N, M, k, dtype, bytes_per_score=4 if dtype == torch.int8 else dtype.itemsize)
    values_NK, indices_NK = x_ND.new_empty(N, k), x_ND.new_empty(N, k, dtype=torch.int64)
    also: Callable[[slice], tuple[Tensor, ...]]
    if dtype == torch.int8:
        rounded = scores.round_to_8_bits(x_ND, W_MD)
        scores_of, also = rounded.products(rows), lambda some: (rounded.W_scale_M, b_M, rounded.one_over_x_N[some])
    elif dtype == torch.bfloat16:
        scores_of, also = scores.in_bfloat16(x_ND, W_MD, b_M, rows), lambda _: ()
    else:
        scores_of, also = scores.products(x_ND, W_MD, rows), lambda _: (b_M,)
    for some in scores.pieces(N, rows, x_ND.device):
        numbers = (some.stop - some.start, M, k, parts, in_order, torch.get_num_threads())
        _call(TOPK[dtype], scores_of(some), *also(some), *numbers, values_NK[some], indices_NK[some])
    return values_NK, indices_NK


def _topk_with_amx(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, in_order: bool) -> tuple[Tensor, Tensor]:
    """Compute `topk` without storing the scores, which are float32 sums of bfloat16 products."""
    (N, D), M, threads = x_ND.shape, len(W_MD), torch.get_num_threads()
    E = -(-(D + 2) // AMX_TILE) * AMX_TILE
    x_low = x_ND.new_empty(-(-N // AMX_TILE) * AMX_TILE * E, dtype=torch.bfloat16)
    W_low = _kept.numbers(-(-M // AMX_TILE) * AMX_TILE * E)
    _call("amx_pack_tokens", x_ND, N, D, E, threads, x_low)
    _call("amx_pack_weights", W_MD, b_M, M, D, E, threads, W_low)
    values_NK, indices_NK = x_ND.new_empty(N, k), x_ND.new_empty(N, k, dtype=torch.int64)
    _call("amx_topk", x_low, W_low, N, M, E, k, in_order, threads, values_NK, indices_NK)
    return values_NK, indices_NK


class _Kept(threading.local):
    """A buffer for weights in low precision, reused by all SAEs and steps.

    The C library requests buffers of 32 MiB or more from the operating system each time, which takes twice as long as
    packing the weights.
    """

    memory: Tensor | None = None

    def numbers(self, count: int) -> Tensor:
        """Return a buffer of `count` bfloat16 numbers, valid until the next call."""
        if self.memory is None or len(self.memory) < count:
            self.memory = torch.empty(count, dtype=torch.bfloat16)
        return self.memory


_kept = _Kept()


@cache
def has_amx() -> bool:
    """Return whether this CPU has AMX for bfloat16 and the operating system lets this process use it."""
    return bool(library().amx_ready())


def best_of(scores_NC: Tensor, latents_NC: Tensor, k: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Compute `torch_ops.best_of`."""
    (N, C), latents_NC = scores_NC.shape, latents_NC.contiguous()
    fit = latents_NC.shape == (N, C) and latents_NC.dtype == torch.int64 and 0 < k // parts <= C // parts
    if not (fit and _all_float32(scores_NC) and C // parts <= FEW):
        return torch_ops.best_of(scores_NC, latents_NC, k, parts)
    values_NK, indices_NK = scores_NC.new_empty(N, k), latents_NC.new_empty(N, k)
    _call("best_of", scores_NC, latents_NC, N, C, k, parts, torch.get_num_threads(), values_NK, indices_NK)
    return values_NK, indices_NK


def gather_dot(x_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
    """Compute `torch_ops.gather_dot`."""
    (N, D), K = x_ND.shape, indices_NK.shape[1]
    if not (_all_float32(x_ND, W_MD) and W_MD.shape[1] == D and len(indices_NK) == N):
        return torch_ops.gather_dot(x_ND, W_MD, indices_NK)
    indices_NK, out_NK = _below(len(W_MD), indices_NK), x_ND.new_empty(N, K)
    _call("gather_dot", x_ND, W_MD, indices_NK, N, K, D, torch.get_num_threads(), out_NK)
    return out_NK


def gather_sum(weights_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
    """Compute `torch_ops.gather_sum`."""
    N, K = indices_NK.shape
    if not (_all_float32(weights_NK, W_MD) and weights_NK.shape == (N, K)):
        return torch_ops.gather_sum(weights_NK, indices_NK, W_MD)
    starts = torch.arange(N + 1, device=W_MD.device) * K
    return segment_sum(weights_NK.view(-1), indices_NK.flatten(), starts, W_MD)


def segment_sum(weights_P: Tensor, tokens_P: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
    """Compute `torch_ops.segment_sum`."""
    if not (_all_float32(weights_P, rows_ND) and weights_P.shape == tokens_P.shape):
        return torch_ops.segment_sum(weights_P, tokens_P, starts_M, rows_ND)
    M, D = len(starts_M) - 1, rows_ND.shape[1]
    tokens_P, out_MD = _below(len(rows_ND), tokens_P), rows_ND.new_empty(M, D)
    _call("weighted_sums", weights_P, tokens_P, starts_M, rows_ND, M, D, torch.get_num_threads(), out_MD)
    return out_MD


def sort_pairs(indices_NK: Tensor, num_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `torch_ops.sort_pairs`."""
    if indices_NK.device.type not in DEVICES:
        return torch_ops.sort_pairs(indices_NK, num_latents)
    indices_NK = _below(num_latents, indices_NK)
    # Three tensors rather than one buffer, since the tokens may live longer than the others.
    order, tokens, starts = map(indices_NK.new_empty, (indices_NK.numel(), indices_NK.numel(), num_latents + 1))
    _call("sort_pairs", indices_NK, indices_NK.numel(), indices_NK.shape[1], num_latents, order, tokens, starts)
    return order, tokens, starts


def _below(rows: int, indices: Tensor) -> Tensor:
    """Return row indices as contiguous int64, and check them, since the loops in C++ do not.

    Raises:
        IndexError: If an index is negative or not below `rows`.
    """
    indices = indices.to(torch.int64).contiguous()
    if not indices.is_meta and not library().all_below(_as_c(indices), _as_c(indices.numel()), _as_c(rows)):
        raise IndexError(f"an index is out of range for {rows} rows")
    return indices


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
    """Compute `eager.adam_`, with all operations on a row done while it is in the cache.

    For a gradient of `RowSums` these include the sum of the row's gradient.
    """
    moments, bfloat16 = (exp_avg, exp_avg_sq), _all_of(torch.bfloat16, exp_avg, exp_avg_sq)
    settings = numbers, beta1, beta2, eps, unit_rows, torch.get_num_threads()
    if _all_of(torch.float64, numbers) and (bfloat16 or _all_float32(*moments)):
        if isinstance(grad, RowSums):
            weights_P, tokens_P, starts_M, rows_ND = grad
            (M, D), floats = param.shape, (param, weights_P, rows_ND)
            if _all_float32(*floats) and (len(starts_M), rows_ND.shape[1]) == (M + 1, D):
                sums = weights_P, _below(len(rows_ND), tokens_P), starts_M, rows_ND
                _call("adam_of_sums", param, *sums, *moments, bfloat16, M, D, *settings)
                return
        elif _all_float32(param, grad):
            width = param.shape[-1] if unit_rows else 1
            _call("adam", param, grad, *moments, bfloat16, param.numel(), width, *settings)
            return
    grad = segment_sum(*grad) if isinstance(grad, RowSums) else grad
    torch_ops.adam_(param, grad, *moments, numbers=numbers, beta1=beta1, beta2=beta2, eps=eps, unit_rows=unit_rows)


def _all_float32(*tensors: Tensor) -> bool:
    return _all_of(torch.float32, *tensors)


def _all_of(dtype: torch.dtype, *tensors: Tensor) -> bool:
    return all(each.dtype == dtype and each.device.type in DEVICES and each.is_contiguous() for each in tensors)


def _call(name: str, *arguments: Tensor | int | float | bool) -> None:
    """Call a function of `native.cpp`, passing tensors as pointers, and numbers as int64_t, float and bool."""
    if not any(isinstance(each, Tensor) and each.is_meta for each in arguments):
        getattr(library(), name)(*map(_as_c, arguments))


def _as_c(argument: Tensor | int | float | bool) -> ctypes._SimpleCData:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        return ctypes.c_bool(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)
