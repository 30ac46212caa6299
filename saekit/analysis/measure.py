"""Measure a trained SAE without its language model. Shapes: M latents, D width of the activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saekit.sae.kernels.eager import unit_rows

DUPLICATE_COSINE = 0.95
"""Two decoder rows count as duplicates if their cosine is above this."""

DENSITY_DECADES = 6
"""The histogram of firing densities goes from 10^-6 to 1."""

BINS_PER_DECADE = 4

EXACT_BUDGET = 10**11
"""Multiply-adds for nearest neighbors (5 to 10 s on two CPU cores). If all rows take more, a sample is compared."""


@dataclass(frozen=True)
class Density:
    """The distribution of firing densities over latents. A firing density is a share of tokens, from 0 to 1."""

    p5: float
    """5% of all latents, including those that never fired, have a lower density. The others are percentiles too."""
    p25: float
    p50: float
    p75: float
    p95: float
    histogram: tuple[int, ...]
    """The number of latents per quarter of a decade of density, from 1e-6 to 1. The first bin includes lower densities.
    Latents that never fired are not counted."""


@dataclass(frozen=True)
class NearestCosines:
    """Statistics of each decoder row's cosine with its nearest other row."""

    median: float
    p99: float
    max: float
    duplicates: int
    """The number of pairs with a cosine above `DUPLICATE_COSINE`. An estimate unless all rows were compared."""
    rows: int
    """The number of rows compared with all others: M, or an even sample if M is too large."""


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of the weights' rows."""

    decoder_min: float
    decoder_median: float
    decoder_max: float
    encoder_median: float
    b_dec: float


def density(fire_count_M: Tensor, tokens: int) -> Density:
    """Compute the distribution of firing densities.

    Args:
        fire_count_M: `[M]`, int64: the number of tokens on which each latent fired.
        tokens: The total number of tokens, at least 1.
    """
    share_M = fire_count_M.double() / tokens
    points = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    p5, p25, p50, p75, p95 = share_M.quantile(points).tolist()
    bins = DENSITY_DECADES * BINS_PER_DECADE
    log10 = share_M[share_M > 0].log10()
    place = ((log10 + DENSITY_DECADES) * BINS_PER_DECADE).floor().long().clamp(0, bins - 1)
    return Density(p5, p25, p50, p75, p95, histogram=tuple(torch.bincount(place, minlength=bins).tolist()))


def norms(encoder_MD: Tensor, decoder_MD: Tensor, b_dec_D: Tensor) -> Norms:
    """Compute the norms of the encoder's and the decoder's rows and of the decoder's bias."""
    decoder_M = decoder_MD.norm(dim=1)
    return Norms(
        decoder_min=decoder_M.min().item(),
        decoder_median=decoder_M.quantile(0.5).item(),
        decoder_max=decoder_M.max().item(),
        encoder_median=encoder_MD.norm(dim=1).quantile(0.5).item(),
        b_dec=b_dec_D.norm().item(),
    )


def neighbours(decoder_MD: Tensor, budget: int = EXACT_BUDGET) -> NearestCosines | None:
    """Compute cosines of nearest decoder rows, in pieces of a few million: `[M, M]` never exists all at once.

    Args:
        decoder_MD: `[M, D]`, float32. A row of zeros has cosine 0 with every other.
        budget: Multiply-adds to spend. If comparing all pairs takes more, an even sample of rows is compared.

    Returns:
        The statistics, or None for a dictionary of one latent.
    """
    num_latents, width = decoder_MD.shape
    if num_latents < 2:
        return None
    unit_MD = unit_rows(decoder_MD)
    if num_latents * num_latents * width // 2 <= budget:
        nearest, duplicates = _all_pairs(unit_MD)
    else:
        sample = max(2, min(num_latents, budget // (num_latents * width)))
        nearest, duplicates = _sampled_rows(unit_MD, torch.linspace(0, num_latents - 1, sample).long())
    # Rounding can make the cosine of equal rows slightly larger than 1.
    nearest = nearest.clamp_max(1)
    median, p99 = nearest.quantile(torch.tensor([0.5, 0.99])).tolist()
    return NearestCosines(median, p99, nearest.max().item(), duplicates, rows=len(nearest))


def _all_pairs(unit_MD: Tensor) -> tuple[Tensor, int]:
    """Compute each row's largest cosine, `[M]`, and the number of duplicates, with one product per pair."""
    nearest_M = torch.full((len(unit_MD),), -1.0)
    duplicates = 0
    chunk = rows_at_a_time(len(unit_MD))
    for start in range(0, len(unit_MD), chunk):
        stop = min(start + chunk, len(unit_MD))
        # Only rows from `start` on, since earlier pieces include the pairs with earlier rows.
        cosine = unit_MD[start:stop] @ unit_MD[start:].T
        own = cosine[:, : stop - start]
        own.masked_fill_(torch.ones_like(own, dtype=torch.bool).tril(), -1)
        nearest_M[start:stop] = torch.maximum(nearest_M[start:stop], cosine.amax(dim=1))
        nearest_M[start:] = torch.maximum(nearest_M[start:], cosine.amax(dim=0))
        duplicates += int((cosine > DUPLICATE_COSINE).sum())
    return nearest_M, duplicates


def _sampled_rows(unit_MD: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """Compute the sampled rows' largest cosines, and the number of duplicates, extrapolated to all rows."""
    nearest, found = [], 0
    for piece in rows.split(rows_at_a_time(len(unit_MD))):
        cosine = unit_MD[piece] @ unit_MD.T
        cosine[torch.arange(len(piece)), piece] = -1
        nearest.append(cosine.amax(dim=1))
        found += int((cosine > DUPLICATE_COSINE).sum())
    return torch.cat(nearest), round(found / 2 * len(unit_MD) / len(rows))


def rows_at_a_time(num_latents: int) -> int:
    """Return how many rows to compare at a time, so that their cosines with all rows take 64 MiB."""
    return max(1, 2**24 // num_latents)


class Neighbours(NamedTuple):
    """For each of L decoder rows, the N nearest other rows by cosine."""

    latents_LN: Tensor
    """int64, nearest first."""
    cosines_LN: Tensor
    """float32."""


def nearest_rows(decoder_MD: Tensor, latents_L: Tensor, number: int) -> Neighbours:
    """Find the nearest rows of some decoder rows, in pieces: `[L, M]` never exists all at once.

    Args:
        decoder_MD: `[M, D]`. A row of zeros has cosine 0 with every other.
        latents_L: Indices of the rows, int64.
        number: N. Fewer if the dictionary is too small.
    """
    unit_MD = unit_rows(decoder_MD.float())
    number = min(number, len(unit_MD) - 1)
    latents, cosines = [], []
    for rows in latents_L.split(rows_at_a_time(len(unit_MD))):
        cosine = unit_MD[rows] @ unit_MD.T
        cosine[torch.arange(len(rows)), rows] = -torch.inf
        best = cosine.topk(number, dim=1)
        latents.append(best.indices)
        # Rounding can make the cosine of equal rows slightly larger than 1.
        cosines.append(best.values.clamp(-1, 1))
    return Neighbours(torch.cat(latents), torch.cat(cosines))
