"""Deferred gradients: keep a matrix's gradient as the terms of its sum until the optimizer computes each row.

The gradient of an SAE's matrix is as large as the matrix, and all layers have theirs at the end of a step. The terms of
its sum are a row per token and a number per pair (latent, token), which usually take less memory if there are fewer
tokens than latents. Adam can compute a row of the gradient when it steps that row, so no gradient is written to memory.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class RowSums(NamedTuple):
    """A gradient `[M, D]` as sums: row m is the sum of `weights[p] · rows[tokens[p]]` over the pairs p of latent m.

    These are the pairs from `starts[m]` to `starts[m + 1] - 1`. The fields are arguments of `torch_ops.segment_sum`.
    """

    weights_P: Tensor
    tokens_P: Tensor
    starts_M: Tensor
    rows_ND: Tensor

    def dense(self) -> Tensor:
        """Compute the gradient `[M, D]`. This is the readable reference, which makes a tensor `[P, D]`."""
        counts_M = self.starts_M.diff()
        latents_P = torch.arange(len(counts_M), device=counts_M.device).repeat_interleave(counts_M)
        sums_MD = self.rows_ND.new_zeros(len(counts_M), self.rows_ND.shape[1])
        return sums_MD.index_add_(0, latents_P, self.weights_P[:, None] * self.rows_ND[self.tokens_P])

    def bound(self) -> Tensor:
        """Return a scalar bound on the gradient's magnitude, NaN or Inf if the gradient has one (else hardly ever)."""
        if not len(self.rows_ND):
            return self.weights_P.new_zeros(())
        least, most = self.rows_ND.aminmax()  # takes an eighth of the time of torch's infinity norm on a CPU
        return self.weights_P.abs().sum() * torch.maximum(-least, most)


class Deferred(list[RowSums]):
    """The deferred gradients of one matrix. A subclass of list, so that it can be weakly referenced."""


_DEFERRED = WeakTensorKeyDictionary()
"""Weak references to the lists, by matrix. Once its optimizer is gone, a matrix gets its `.grad` again."""


def defer_gradient(W_MD: Tensor) -> Deferred:
    """Make backward passes add a matrix's gradients to the returned list, as `RowSums`, instead of to its `.grad`.

    This happens only if the sums take less memory than the gradient, and only with kernels that compute such sums. The
    matrix's optimizer must add up both, and empty the list.
    """
    deferred = Deferred()
    _DEFERRED[W_MD] = weakref.ref(deferred)
    return deferred


def try_to_defer(W_MD: Tensor, sums: RowSums) -> bool:
    """Add sums to a matrix's deferred gradients, if it has such a list and they take less memory than the gradient.

    Returns:
        Whether they were added.
    """
    reference = _DEFERRED.get(W_MD)
    deferred = reference() if reference is not None else None
    if deferred is None or sum(each.nbytes for each in sums) >= W_MD.nbytes:
        return False
    deferred.append(sums)
    return True
