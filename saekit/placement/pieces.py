"""Where DeepSpeed keeps this rank's part of each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """This rank's part of a parameter, and where it lies in the flat tensor that DeepSpeed hands to the optimiser."""

    shape: torch.Size
    """Of the whole parameter."""
    shard: Tensor
    """What the ranks gather before a layer computes, `[size]`."""
    flat: Tensor
    """Master weights, behind each other, of all the parameters that are stepped together."""
    start: int
    size: int

    def of(self, like_flat: Tensor) -> Tensor:
        """The piece of a tensor that is laid out like the flat one: the flat one itself, a gradient, a moment."""
        return like_flat.narrow(0, self.start, self.size)

    def cut(self, pieces: Tensor) -> Tensor:
        """The whole tensor, of all ranks' pieces `[ranks, size]`: behind the last element there is padding."""
        return pieces.view(-1)[: self.shape.numel()].view(self.shape)


def share_masters(zero_optimizer: Any) -> None:
    """Let the optimiser step the shards themselves where nothing is offloaded.

    DeepSpeed keeps float32 master weights beside shards of another type; of float32 shards they are a mere copy.
    """
    pairs = zip(zero_optimizer.fp16_partitioned_groups_flat, zero_optimizer.fp32_partitioned_groups_flat, strict=True)
    for shards, masters in pairs:
        if shards.device == masters.device and shards.dtype == masters.dtype:
            masters.data = shards.data


def find_pieces(zero_optimizer: Any) -> dict[nn.Parameter, Piece]:
    """Where DeepSpeed has put each parameter's shard: those of a group lie one behind the other."""
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
    """Whether the master weights are the shards themselves."""
    starts = {flat.data_ptr() for flat in flats}
    return any(shard.data_ptr() in starts for shard in shards)
