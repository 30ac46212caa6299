"""Where in a text latents fire: their strongest places, and some of the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saekit.features.codes import Codes

BEFORE, AFTER = 23, 8
"""Tokens that are shown around the one at which a latent is strongest."""
WINDOW = BEFORE + 1 + AFTER
STRETCH = 64
"""Of each stretch of so many tokens only the strongest place counts: else a list would be one passage over and over."""


@dataclass(frozen=True)
class Contexts:
    """Places of L latents, C each: the strongest ones, and behind those some from all over the rest."""

    places_LC: np.ndarray
    """int64, strongest first; -1 where there are no more."""
    acts_LC: np.ndarray
    """float32: the activation there."""
    acts_LCW: np.ndarray
    """float32 `[L, C, WINDOW]`: activations of the latent from `BEFORE` tokens before to `AFTER` behind; 0 beyond the
    sequence's ends."""


def find_contexts(codes: Codes, latents_L: np.ndarray, ctx_len: int, top: int, spread: int) -> Contexts:
    """Find the places to show.

    Args:
        codes: The SAE's firings.
        latents_L: Numbers of latents, int64.
        ctx_len: T, tokens per sequence.
        top: How many of the strongest.
        spread: How many more, evenly by rank over all that are weaker.
    """
    latents_B, places_B, acts_B = _peaks(codes, ctx_len)
    starts_L, ends_L = np.searchsorted(latents_B, latents_L), np.searchsorted(latents_B, latents_L, side="right")
    found_L = ends_L - starts_L
    ranks_LC = np.concatenate([_first(found_L, top), _spread(found_L - top, spread)], axis=1)
    ranks_LC[:, top:] += np.where(ranks_LC[:, top:] < 0, 0, top)
    there_LC = ranks_LC >= 0
    rows_LC = np.where(there_LC, starts_L[:, None] + ranks_LC, 0)
    if not len(places_B):
        places_B, acts_B = np.zeros(1, np.int64), np.zeros(1, np.float32)
    places_LC = np.where(there_LC, places_B[rows_LC], -1)
    return Contexts(
        places_LC,
        np.where(there_LC, acts_B[rows_LC], np.float32(0)),
        _windows(codes, latents_L, places_LC, ctx_len),
    )


def _peaks(codes: Codes, ctx_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The strongest place of each latent in each stretch: latents, places, activations, by latent, strongest first."""
    per_sequence = -(-ctx_len // STRETCH)
    stretch_P = codes.places_P // ctx_len * per_sequence + codes.places_P % ctx_len // STRETCH
    # By latent and place already, so a latent's firings of one stretch follow each other.
    new_P = np.ones(len(stretch_P), bool)
    new_P[1:] = (np.diff(stretch_P) != 0) | (np.diff(codes.latents_P) != 0)
    group_P = np.cumsum(new_P) - 1
    best_P = np.lexsort((codes.places_P, -codes.acts_P, group_P))
    best_B = best_P[np.flatnonzero(new_P)]
    order = np.lexsort((-codes.acts_P[best_B], codes.latents_P[best_B]))
    best_B = best_B[order]
    return codes.latents_P[best_B], codes.places_P[best_B], codes.acts_P[best_B]


def _first(found_L: np.ndarray, number: int) -> np.ndarray:
    """Ranks 0, 1, ... as far as there are any, else -1; int64 `[L, number]`."""
    ranks = np.broadcast_to(np.arange(number), (len(found_L), number))
    return np.where(ranks < found_L[:, None], ranks, -1)


def _spread(found_L: np.ndarray, number: int) -> np.ndarray:
    """Ranks evenly over all, the middle of each of `number` parts; all where there are no more than that."""
    found_L1 = np.maximum(found_L, 0)[:, None]
    parts = ((np.arange(number) + 0.5) / max(number, 1) * found_L1).astype(np.int64)
    return np.where(found_L1 > number, parts, _first(found_L, number))


def _windows(codes: Codes, latents_L: np.ndarray, places_LC: np.ndarray, ctx_len: int) -> np.ndarray:
    places_LCW = places_LC[:, :, None] + np.arange(-BEFORE, AFTER + 1)
    same_sequence = (places_LC[:, :, None] >= 0) & (places_LCW // ctx_len == places_LC[:, :, None] // ctx_len)
    acts_LCW = codes.at(latents_L[:, None, None], np.where(same_sequence, places_LCW, 0))
    return np.where(same_sequence, acts_LCW, np.float32(0))
