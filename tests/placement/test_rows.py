"""Shards of a matrix, all in one process: the ranks' sums are added here."""

from collections import deque

import pytest
import torch
from torch.nn import functional

from saekit.placement.shards import RowShard, project_rows_, scale_rows_
from saekit.sae import Sae, normalize_decoder_, project_decoder_gradient_


def cut(whole, ranks):
    """Equal shards with the padding that stands behind the last element."""
    size = -(-whole.numel() // ranks)
    padded = functional.pad(whole.reshape(-1), (0, size * ranks - whole.numel()), value=float("nan"))
    return [piece.clone() for piece in padded.split(size)]


def joined(shards, like):
    return torch.cat(shards)[: like.numel()].view_as(like)


def on_all(ranks, step):
    """Run `step(rank, sum_over_ranks)` for all ranks: once to collect what they add up, once with the sums."""
    parts = []
    for rank in range(ranks):
        mine = []
        parts.append(mine)
        step(rank, lambda partial, mine=mine: mine.append(partial) or torch.ones_like(partial), dry=True)
    for rank in range(ranks):
        totals = deque(sum(together) for together in zip(*parts, strict=True))
        step(rank, lambda partial, totals=totals: totals.popleft(), dry=False)


def bank(latents, width):
    sae = Sae(width, latents, 1, generator=torch.Generator().manual_seed(0))
    sae.W_dec.data = torch.randn(latents, width, generator=torch.Generator().manual_seed(1))
    sae.W_dec.data[2] = 0  # a zero row stays zero
    sae.W_dec.grad = torch.randn(latents, width, generator=torch.Generator().manual_seed(2))
    return sae


# 8 latents are cut between rows by 2 and 4 ranks, inside them by 3 and 5; 3 rows of 2 on 8 ranks leave some with none.
@pytest.mark.parametrize(
    ("latents", "width", "ranks"), [(8, 5, 1), (8, 5, 2), (8, 5, 4), (8, 5, 3), (8, 5, 5), (3, 2, 8)]
)
def test_sharded_rows_are_scaled_and_projected_like_whole_ones(latents, width, ranks):
    sae = bank(latents, width)
    weights, gradients = cut(sae.W_dec.data, ranks), cut(sae.W_dec.grad, ranks)
    places = [RowShard.of(rank, weights[0].numel(), latents, width) for rank in range(ranks)]

    def project(rank, sums, dry):
        gradient = gradients[rank].clone() if dry else gradients[rank]
        project_rows_(gradient, weights[rank], places[rank], sums)

    def scale(rank, sums, dry):
        scale_rows_(weights[rank].clone() if dry else weights[rank], places[rank], sums)

    on_all(ranks, project)
    on_all(ranks, scale)
    project_decoder_gradient_(sae)
    normalize_decoder_(sae)
    torch.testing.assert_close(joined(gradients, sae.W_dec), sae.W_dec.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined(weights, sae.W_dec), sae.W_dec.data)


def test_whole_rows_need_no_other_rank():
    sae = bank(8, 5)
    weights = cut(sae.W_dec.data, 4)

    def nobody(partial):
        raise AssertionError("a sum over ranks, although no row is cut")

    for rank, shard in enumerate(weights):
        scale_rows_(shard, RowShard.of(rank, shard.numel(), 8, 5), nobody)
    normalize_decoder_(sae)
    torch.testing.assert_close(joined(weights, sae.W_dec), sae.W_dec.data)
