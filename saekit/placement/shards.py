"""Sharded coders: where DeepSpeed keeps this rank's part of each tensor, and rows that are cut between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

SumOverRanks = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks. Called by all ranks or by none."""


@dataclass(frozen=True)
class Piece:
    """This rank's part of a parameter, and its place in the flat tensor that DeepSpeed passes to the optimizer."""

    shape: torch.Size
    """The shape of the whole parameter."""
    shard: Tensor
    """The tensor that the ranks gather before a unit computes, `[size]`."""
    flat: Tensor
    """The concatenated master weights of all parameters that are stepped together."""
    start: int
    """The piece's first element in `flat`."""
    size: int
    """Elements of the piece, padding included."""

    def of(self, like_flat: Tensor) -> Tensor:
        """Return the piece of a tensor with the layout of `flat`, such as `flat` itself, its gradient or a moment."""
        return like_flat.narrow(0, self.start, self.size)

    def gathered(self, mine: Tensor, device: torch.device) -> Tensor:
        """Gather the whole tensor from the ranks' pieces, on every rank. Collective.

        Args:
            mine: This rank's piece, `[size]`.
            device: The device on which ranks exchange tensors; the result is there, too.
        """
        mine = mine.to(device).contiguous()
        whole = mine.new_empty(dist.get_world_size(), mine.numel())
        _all_gather(whole.view(-1), mine)
        return self.unpadded(whole)

    def unpadded(self, whole: Tensor) -> Tensor:
        """Return all ranks' pieces, `[ranks, size]`, in the parameter's shape, without the padding at the end."""
        return whole.view(-1).narrow(0, 0, self.shape.numel()).view(self.shape)

    def part(self, value: Tensor) -> Tensor:
        """Return this rank's part of a tensor, flat and without padding, as a view.

        A tensor that does not have the parameter's shape is returned as it is.
        """
        start = dist.get_rank() * self.size
        return value.reshape(-1)[start : start + self.size] if value.shape == self.shape else value

    def put(self, part: Tensor, like_flat: Tensor) -> None:
        """Copy this rank's part of a tensor to its place. The padding at the end stays as it is."""
        self.of(like_flat)[: part.numel()].copy_(part)

    def is_laid_out(self, value: Any) -> bool:
        """Tell whether a value of the optimizer's state has a number for each element of the flat tensor."""
        return isinstance(value, Tensor) and value.numel() == self.flat.numel()


def _all_gather(whole: Tensor, mine: Tensor) -> None:
    """Gather into one tensor. For a list of tensors, NCCL's process group would gather into a copy."""
    # torch 2.13 has renamed it, and warns about the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, mine)


def share_masters(zero_optimizer: Any) -> None:
    """Make the optimizer step the shards themselves if nothing is offloaded; otherwise pin the master weights.

    DeepSpeed keeps float32 master weights for shards of another type. For float32 shards they are only a copy. If a
    GPU's shards have masters on the CPU, DeepSpeed pins the gradients that travel to the CPU, but not the masters that
    travel back after each step.
    """
    pairs = zip(zero_optimizer.fp16_partitioned_groups_flat, zero_optimizer.fp32_partitioned_groups_flat, strict=True)
    for shards, masters in pairs:
        if shards.device == masters.device and shards.dtype == masters.dtype:
            masters.data = shards.data
        elif shards.device.type == "cuda" and masters.device.type == "cpu":
            masters.data = masters.data.pin_memory()


def find_pieces(zero_optimizer: Any) -> dict[nn.Parameter, Piece]:
    """Return where DeepSpeed has put each parameter's shard. The shards of a group are concatenated."""
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
    """One rank's contiguous shard of the elements of a row-major matrix `[M, D]`.

    Shards have equal length, `ceil(M·D / ranks)`, with padding at the end. If the number of ranks divides M, shards
    hold whole rows, and sums over rows need not travel.
    """

    count: int
    """M, rows of the whole matrix."""
    width: int
    """D."""
    start: int
    """The place of the shard's first element in the matrix."""
    size: int
    """Elements of the matrix in the shard; padding follows them."""
    whole_rows: bool
    """Whether all shards consist of whole rows."""

    @classmethod
    def of(cls, rank: int, shard: int, count: int, width: int) -> RowShard:
        """Return a rank's shard, of `shard` elements, of a matrix `[count, width]`."""
        start = min(rank * shard, count * width)
        size = min(shard, count * width - start)
        return cls(count, width, start, size, whole_rows=shard % width == 0)

    @property
    def first(self) -> int:
        """Return the number of the first row that the shard has elements of."""
        return self.start // self.width

    def rows(self, shard: Tensor) -> Tensor:
        """Return the shard as `[rows, D]`, with zeros for elements on other ranks. A view if rows are whole."""
        lead = self.start % self.width
        elements = functional.pad(shard[: self.size], (lead, -(lead + self.size) % self.width))
        return elements.view(-1, self.width)

    def unrows(self, rows: Tensor) -> Tensor:
        """Return the inverse of `rows`, without the padding: `[size]`."""
        lead = self.start % self.width
        return rows.reshape(-1)[lead : lead + self.size]

    def complete(self, partial: Tensor, sum_over_ranks: SumOverRanks) -> Tensor:
        """Turn sums over parts of rows, `[sums, rows]`, into sums over whole rows. Collective unless rows are whole."""
        if self.whole_rows:
            return partial
        everywhere = partial.new_zeros(partial.shape[0], self.count)
        here = slice(self.first, self.first + partial.shape[1])
        everywhere[:, here] = partial
        return sum_over_ranks(everywhere)[:, here]


def scale_rows_(shard: Tensor, where: RowShard, sum_over_ranks: SumOverRanks) -> None:
    """Scale the rows of a sharded matrix to norm 1, in place, as `normalize_decoder_` does. Zero rows stay zero."""
    rows = where.rows(shard)
    norms = _norms(where.complete(rows.square().sum(1)[None], sum_over_ranks)[0])
    shard[: where.size] = where.unrows(rows / norms[:, None])


def project_rows_(gradient: Tensor, shard: Tensor, where: RowShard, sum_over_ranks: SumOverRanks) -> None:
    """Remove from a sharded gradient its component parallel to each row of the matrix, in place.

    As `project_decoder_gradient_` does for whole tensors.
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

    The hooks see master weights and gradients on the device that they are offloaded to. DeepSpeed steps one flat tensor
    at a time.

    Args:
        decoders: The pieces of the decoders whose rows are kept at norm 1.
        rank: This rank.
        sum_over_ranks: Sums over rows that are cut between ranks.
    """

    def __init__(self, decoders: Sequence[Piece], rank: int, sum_over_ranks: SumOverRanks) -> None:
        self._pieces: Mapping[Tensor, Piece] = {piece.flat: piece for piece in decoders}
        self._rank = rank
        self._sum = sum_over_ranks

    @torch.no_grad()
    def project(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Project the gradients before the optimizer's step, as `saekit.sae.project_decoder_gradient_` does."""
        for piece in self._stepping(optimizer):
            gradient = piece.of(piece.flat.grad)  # type: ignore[arg-type]  # every layer has had a backward pass
            project_rows_(gradient, piece.of(piece.flat), self._rows(piece), self._sum)

    @torch.no_grad()
    def normalize(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Scale the rows after the optimizer's step, as `saekit.sae.normalize_decoder_` does."""
        for piece in self._stepping(optimizer):
            scale_rows_(piece.of(piece.flat), self._rows(piece), self._sum)

    def _stepping(self, optimizer: torch.optim.Optimizer) -> Iterator[Piece]:
        """Yield the decoders in the flat tensors that are being stepped."""
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if flat in self._pieces:
                    yield self._pieces[flat]

    def _rows(self, piece: Piece) -> RowShard:
        count, width = piece.shape
        return RowShard.of(self._rank, piece.size, count, width)
