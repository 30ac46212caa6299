"""Coders cut among ranks: where DeepSpeed keeps this rank's part of each tensor, and rows that are cut apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

SumOverRanks = Callable[[Tensor], Tensor]
"""A tensor summed over all ranks; called by all of them, or by none."""


@dataclass(frozen=True)
class Piece:
    """This rank's part of a parameter, and where it lies in the flat tensor that DeepSpeed hands to the optimizer."""

    shape: torch.Size
    """Of the whole parameter."""
    shard: Tensor
    """The tensor that the ranks gather before a unit computes, `[size]`."""
    flat: Tensor
    """Master weights, behind each other, of all the parameters that are stepped together."""
    start: int
    size: int

    def of(self, like_flat: Tensor) -> Tensor:
        """The piece of a tensor that is laid out like the flat one: the flat one itself, a gradient, a moment."""
        return like_flat.narrow(0, self.start, self.size)

    def gathered(self, mine: Tensor, device: torch.device) -> Tensor:
        """Return the whole tensor from the ranks' pieces of it, on every rank. Collective.

        Args:
            mine: This rank's piece, `[size]`.
            device: Where ranks exchange tensors, and where the result is.
        """
        mine = mine.to(device).contiguous()
        whole = mine.new_empty(dist.get_world_size(), mine.numel())
        _all_gather(whole.view(-1), mine)
        return self.unpadded(whole)

    def unpadded(self, whole: Tensor) -> Tensor:
        """Return all ranks' pieces, `[ranks, size]`, in the parameter's shape: behind the last element is padding."""
        return whole.view(-1).narrow(0, 0, self.shape.numel()).view(self.shape)

    def part(self, value: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, flat, without padding: a view. Others return as they are."""
        start = dist.get_rank() * self.size
        return value.reshape(-1)[start : start + self.size] if value.shape == self.shape else value

    def put(self, part: Tensor, like_flat: Tensor) -> None:
        """Copy this rank's part of a tensor into its place; the padding behind the last element stays."""
        self.of(like_flat)[: part.numel()].copy_(part)

    def is_laid_out(self, value: Any) -> bool:
        """Tell whether a value of the optimizer's state has a number for each element of the flat tensor."""
        return isinstance(value, Tensor) and value.numel() == self.flat.numel()


def _all_gather(whole: Tensor, mine: Tensor) -> None:
    """Into one tensor: for a list of tensors NCCL's process group gathers into another one and copies from there."""
    # Before torch 2.13 it has another name, of which that one warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, mine)


def share_masters(zero_optimizer: Any) -> None:
    """Let the optimizer step the shards themselves where nothing is offloaded; pin what is.

    DeepSpeed keeps float32 master weights for shards of another type; for float32 shards they are only a copy. Where a
    GPU's shards have masters on the CPU, DeepSpeed pins the gradients on their way there, but not the masters, which
    travel back after each step.
    """
    pairs = zip(zero_optimizer.fp16_partitioned_groups_flat, zero_optimizer.fp32_partitioned_groups_flat, strict=True)
    for shards, masters in pairs:
        if shards.device == masters.device and shards.dtype == masters.dtype:
            masters.data = shards.data
        elif shards.device.type == "cuda" and masters.device.type == "cpu":
            masters.data = masters.data.pin_memory()


def find_pieces(zero_optimizer: Any) -> dict[nn.Parameter, Piece]:
    """Return where DeepSpeed has put each parameter's shard: those of a group lie one behind the other."""
    pieces = {}
    groups = zip(zero_optimizer.fp16_groups, zero_optimizer.fp32_partitioned_groups_flat, strict=True)
    for parameters, flat in groups:
        start = 0
        for parameter in parameters:
            size = parameter.partition_numel()
            pieces[parameter] = Piece(parameter.ds_shape, parameter.ds_tensor, flat, start, size)
            start += size
    return pieces


def same_memory(shards: Sequence[Tensor], flats: Any) -> bool:
    """Tell whether the master weights are the shards themselves."""
    starts = {flat.data_ptr() for flat in flats}
    return any(shard.data_ptr() in starts for shard in shards)


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
        """Return the shard of `shard` elements that a rank has of a matrix `[count, width]`."""
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
        """Return the inverse of `rows`, without the padding: `[size]`."""
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


class UnitRows:
    """Keeps the rows of sharded decoders at norm 1, in hooks of the optimizer that steps flat tensors.

    The hooks see master weights and gradients, wherever they are offloaded to. DeepSpeed steps one flat tensor at a
    time.

    Args:
        decoders: The pieces of the decoders to keep at unit norm.
        rank: This rank.
        sum_over_ranks: Sums of rows that are cut apart.
    """

    def __init__(self, decoders: Sequence[Piece], rank: int, sum_over_ranks: SumOverRanks) -> None:
        self._pieces: Mapping[Tensor, Piece] = {piece.flat: piece for piece in decoders}
        self._rank = rank
        self._sum = sum_over_ranks

    @torch.no_grad()
    def project(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before the optimizer's step: see `saekit.sae.project_decoder_gradient_`."""
        for piece in self._stepping(optimizer):
            gradient = piece.of(piece.flat.grad)  # type: ignore[arg-type]  # every layer has had a backward pass
            project_rows_(gradient, piece.of(piece.flat), self._rows(piece), self._sum)

    @torch.no_grad()
    def normalize(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """After it: see `saekit.sae.normalize_decoder_`."""
        for piece in self._stepping(optimizer):
            scale_rows_(piece.of(piece.flat), self._rows(piece), self._sum)

    def _stepping(self, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
        """Decoders in the flat tensors that are being stepped."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat in self._pieces:
                    yield self._pieces[flat]

    def _rows(self, piece: Piece) -> RowShard:
        count, width = piece.shape
        return RowShard.of(self._rank, piece.size, count, width)
