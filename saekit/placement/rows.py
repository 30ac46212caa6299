"""Norms and projections of matrix rows that are cut apart: a shard ends wherever its share of the elements does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SumOverRanks = Callable[[Tensor], Tensor]
"""A tensor summed over all ranks; called by all of them, or by none."""


@dataclass(frozen=True)
class RowShard:
    """One rank's contiguous share of the elements of a row-major matrix `[M, D]`.

    Shards are equally long, `ceil(M·D / ranks)`; the last ones are padded. They hold whole rows if the number of
    ranks divides M; then nothing has to travel.
    """

    count: int
    """M, rows of the whole matrix."""
    width: int
    """D."""
    start: int
    """The first element's place in the matrix."""
    size: int
    """Elements of the matrix in the shard; what comes behind them is padding."""
    whole_rows: bool
    """Whether all ranks' shards begin and end with a row."""

    @classmethod
    def of(cls, rank: int, shard: int, count: int, width: int) -> RowShard:
        """The shard of `shard` elements that a rank has of a matrix `[count, width]`."""
        start = min(rank * shard, count * width)
        size = min(shard, count * width - start)
        return cls(count, width, start, size, whole_rows=shard % width == 0)

    @property
    def first(self) -> int:
        """Number of the first row that it has a part of."""
        return self.start // self.width

    def rows(self, shard: Tensor) -> Tensor:
        """The shard as `[rows, D]`, with zeros where a row's elements are elsewhere; a view if it has whole rows."""
        lead = self.start % self.width
        elements = functional.pad(shard[: self.size], (lead, -(lead + self.size) % self.width))
        return elements.view(-1, self.width)

    def unrows(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`, without the padding: `[size]`."""
        lead = self.start % self.width
        return rows.reshape(-1)[lead : lead + self.size]

    def complete(self, partial: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
        """Sums over the parts of rows, `[sums, rows]`, as sums over whole rows."""
        if self.whole_rows:
            return partial
        everywhere = partial.new_zeros(partial.shape[0], self.count)
        here = slice(self.first, self.first + partial.shape[1])
        everywhere[:, here] = partial
        return sum_over_ranks(everywhere)[:, here]


def scale_rows_(shard: Tensor, where: RowShard, sum_over_ranks: SumOverRanks) -> None:
    """Scale the rows of a sharded matrix to norm 1, in place; a zero row stays zero. See `normalize_decoder_`."""
    rows = where.rows(shard)
    norms = _norms(where.complete(rows.square().sum(1)[None], sum_over_ranks)[0])
    shard[: where.size] = where.unrows(rows / norms[:, None])


def project_rows_(gradient: Tensor, shard: Tensor, where: RowShard, sum_over_ranks: SumOverRanks) -> None:
    """Take the part parallel to each row of a matrix out of its gradient, both sharded, in place.

    See `project_decoder_gradient_`.
    """
    rows, gradient_rows = where.rows(shard), where.rows(gradient)
    partial = torch.stack([(gradient_rows * rows).sum(1), rows.square().sum(1)])
    dot, squares = where.complete(partial, sum_over_ranks)
    norms = _norms(squares)
    along = (dot / norms)[:, None] * (rows / norms[:, None])
    gradient[: where.size] = where.unrows(gradient_rows - along)


def _norms(squares: Tensor) -> Tensor:
    return squares.sqrt().clamp_min(torch.finfo(squares.dtype).tiny)
