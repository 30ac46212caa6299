"""Gradients of matrices that are not made, but kept as what they are the sum of, until the optimizer takes their rows.

The gradient of an SAE's matrix is as large as the matrix, and all layers' are there when a step ends. What it is the
sum of is a row per token, and a number per pair (latent, token): with fewer tokens than latents that is mostly less.
Adam can then make a row of the gradient while it steps that row, so that no gradient goes through memory at all.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class RowSums(NamedTuple):
    """A gradient `[M, D]`: of latent m the sum of `weights[p] · rows[tokens[p]]` over its pairs p.

    Those are the pairs from `starts[m]` to `starts[m + 1]`, as `torch_ops.segment_sum` takes them.
    """

    weights_P: Tensor
    tokens_P: Tensor
    starts_M: Tensor
    rows_ND: Tensor

    def dense(self) -> Tensor:
        """Return the gradient: the readable reference, with a tensor `[P, D]`."""
        counts_M = self.starts_M.diff()
        latents_P = torch.arange(len(counts_M), device=counts_M.device).repeat_interleave(counts_M)
        sums_MD = self.rows_ND.new_zeros(len(counts_M), self.rows_ND.shape[1])
        return sums_MD.index_add_(0, latents_P, self.weights_P[:, None] * self.rows_ND[self.tokens_P])

    def bound(self) -> Tensor:
        """A scalar that no number of the gradient exceeds: NaN or Inf if one of them is, and as good as only then."""
        if not len(self.rows_ND):
            return self.weights_P.new_zeros(())
        least, most = self.rows_ND.aminmax()  # an eighth of what torch's norm of infinity takes on a CPU
        return self.weights_P.abs().sum() * torch.maximum(-least, most)


class Deferred(list[RowSums]):
    """The rows that have been left to a step; a list that can be referred to weakly."""


_DEFERRED = WeakTensorKeyDictionary()
"""By matrix, without keeping either alive: when its optimizer is gone, a matrix has its `.grad` again."""


def defer_gradient(W_MD: Tensor) -> Deferred:
    """From now on, backward passes leave the sums of a matrix's gradient in the list that is returned.

    They do where those take less memory than the gradient; others go to its `.grad`, as all do of kernels that make
    gradients in another way. The optimizer of the matrix adds up what is there, and empties the list.
    """
    deferred = Deferred()
    _DEFERRED[W_MD] = weakref.ref(deferred)
    return deferred


def left_to_the_step(W_MD: Tensor, sums: RowSums) -> bool:
    """Tell whether the gradient of a matrix is deferred: then the sums are in its list."""
    reference = _DEFERRED.get(W_MD)
    deferred = reference() if reference is not None else None
    if deferred is None or sum(each.nbytes for each in sums) >= W_MD.nbytes:
        return False
    deferred.append(sums)
    return True
