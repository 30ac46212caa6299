"""Decoder rows that point in like directions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saekit.report.inspect_measure import chunk_rows, unit_rows


class Neighbours(NamedTuple):
    """Of L decoder rows, the N others nearest in direction."""

    latents_LN: Tensor
    """int64, nearest first."""
    cosines_LN: Tensor
    """float32."""


def nearest_rows(decoder_MD: Tensor, latents_L: Tensor, number: int) -> Neighbours:
    """Compare some decoder rows with all, `[L, M]` never existing at once.

    Args:
        decoder_MD: `[M, D]`; a row of zeros has cosine 0 with every other.
        latents_L: Numbers of the rows, int64.
        number: N; fewer where the dictionary has no more.
    """
    unit_MD = unit_rows(decoder_MD.float())
    number = min(number, len(unit_MD) - 1)
    latents, cosines = [], []
    for rows in latents_L.split(chunk_rows(len(unit_MD))):
        cosine = unit_MD[rows] @ unit_MD.T
        cosine[torch.arange(len(rows)), rows] = -torch.inf
        best = cosine.topk(number, dim=1)
        latents.append(best.indices)
        # Rounding can give the cosine of equal rows as a hair more than 1.
        cosines.append(best.values.clamp(-1, 1))
    return Neighbours(torch.cat(latents), torch.cat(cosines))
