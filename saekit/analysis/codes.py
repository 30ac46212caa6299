"""All firings of an SAE over a text, and what they show.

Shapes: P firings, M latents, L chosen latents, S sequences of T tokens. A *place* is a token's index in the text,
`sequence · T + position`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Codes:
    """The firings of one SAE, sorted by latent, then by place."""

    latents_P: np.ndarray
    """int64"""
    places_P: np.ndarray
    """int64"""
    acts_P: np.ndarray
    """float32, above zero"""
    num_latents: int
    places: int
    """S · T, the number of places, including those of excluded tokens."""

    @classmethod
    def of(
        cls, latents_P: np.ndarray, places_P: np.ndarray, acts_P: np.ndarray, num_latents: int, places: int
    ) -> Codes:
        """Make it from firings in any order."""
        order = np.argsort(latents_P.astype(np.int64) * places + places_P, kind="stable")
        return cls(
            latents_P[order].astype(np.int64),
            places_P[order].astype(np.int64),
            acts_P[order].astype(np.float32),
            num_latents,
            places,
        )

    @cached_property
    def counts_M(self) -> np.ndarray:
        """Return the number of tokens on which each latent fired, int64."""
        return np.bincount(self.latents_P, minlength=self.num_latents)

    @cached_property
    def starts_M(self) -> np.ndarray:
        """Return where each latent's firings begin, int64."""
        return np.cumsum(self.counts_M) - self.counts_M

    @cached_property
    def _keys_P(self) -> np.ndarray:
        return self.latents_P * self.places + self.places_P

    def at(self, latents: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return activations of latents at places, two int64 arrays that broadcast. float32, 0 without a firing."""
        keys = latents * self.places + places
        if not len(self._keys_P):
            return np.zeros(keys.shape, np.float32)
        found = np.minimum(np.searchsorted(self._keys_P, keys), len(self._keys_P) - 1)
        return np.where(self._keys_P[found] == keys, self.acts_P[found], np.float32(0))

    def quantiles(self, latents_L: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
        """Compute quantiles of each latent's activations over the tokens on which it fired.

        Args:
            latents_L: Indices of latents, int64.
            shares: Which quantiles, from 0 to 1. Between two values the lower one is taken, without interpolation.

        Returns:
            float32 `[L, len(shares)]`. NaN for a latent that never fired.
        """
        ascending_P = self.acts_P[np.lexsort((self.acts_P, self.latents_P))]
        counts_L1, starts_L1 = self.counts_M[latents_L, None], self.starts_M[latents_L, None]
        ranks = np.floor(np.array(shares) * np.maximum(counts_L1 - 1, 0)).astype(np.int64)
        found = np.full(ranks.shape, np.nan, np.float32)
        fired_L = counts_L1[:, 0] > 0
        found[fired_L] = ascending_P[(starts_L1 + ranks)[fired_L]]
        return found

    def histograms(self, latents_L: np.ndarray, bins: int) -> Histograms:
        """Count each latent's activations in bins of equal width, over the tokens on which it fired.

        Args:
            latents_L: Numbers of latents, int64.
            bins: Their number, from 0 to the latent's largest activation. Where a selection lets negative values fire,
                the first bin begins at the smallest one.
        """
        counts = np.zeros((len(latents_L), bins), np.int64)
        bounds = np.zeros((len(latents_L), 2), np.float32)
        fired_F = np.flatnonzero(self.counts_M[latents_L])
        if not len(fired_F):
            return Histograms(counts, bounds)
        order_M = np.flatnonzero(self.counts_M)
        row_F = np.searchsorted(order_M, latents_L[fired_F])
        starts = self.starts_M[order_M]
        bounds[fired_F, 0] = np.minimum(np.minimum.reduceat(self.acts_P, starts), 0)[row_F]
        bounds[fired_F, 1] = np.maximum(np.maximum.reduceat(self.acts_P, starts), 0)[row_F]
        row_M = np.full(self.num_latents, -1)
        row_M[latents_L] = np.arange(len(latents_L))
        row_P = row_M[self.latents_P]
        row_P, acts_P = row_P[row_P >= 0], self.acts_P[row_P >= 0].astype(np.float64)
        low_P, high_P = bounds[row_P].astype(np.float64).T
        bin_P = ((acts_P - low_P) / (high_P - low_P) * bins).astype(np.int64).clip(max=bins - 1)
        counts += np.bincount(row_P * bins + bin_P, minlength=counts.size).reshape(counts.shape)
        return Histograms(counts, bounds)

    def favorites(self, latents_L: np.ndarray, ids: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens on which each latent fires most often.

        Args:
            latents_L: Indices of latents, int64.
            ids: The text's token ids by place, int64 `[S · T]`.
            number: The number of tokens per latent.

        Returns:
            Token ids, int64 `[L, number]`, most frequent first, padded with -1. Then the share of the latent's firings
            on each, float32.
        """
        ids_P = ids[self.places_P]
        span = int(ids.max(initial=0)) + 1
        pairs_Q, counts_Q = np.unique(self.latents_P * span + ids_P, return_counts=True)
        latents_Q = pairs_Q // span
        order = np.lexsort((-counts_Q, latents_Q))
        pairs_Q, counts_Q, latents_Q = pairs_Q[order], counts_Q[order], latents_Q[order]
        starts_L, ends_L = np.searchsorted(latents_Q, latents_L), np.searchsorted(latents_Q, latents_L, side="right")
        places = starts_L[:, None] + np.arange(number)
        there = places < ends_L[:, None]
        places = np.where(there, places, 0)
        if not len(pairs_Q):
            return np.full(there.shape, -1, np.int64), np.zeros(there.shape, np.float32)
        shares = counts_Q[places] / np.maximum(self.counts_M[latents_L], 1)[:, None]
        return np.where(there, pairs_Q[places] % span, -1), np.where(there, shares, 0).astype(np.float32)


class Histograms(NamedTuple):
    """Of L latents, how often which activation came."""

    counts_LB: np.ndarray
    """int64 `[L, bins]`: tokens per bin; zeros for a latent that never fired."""
    bounds_L2: np.ndarray
    """float32 `[L, 2]`: where the first bin begins and the last one ends; both 0 for a latent that never fired."""


BEFORE, AFTER = 23, 8
"""Tokens shown before and after the one at which a latent is strongest."""
WINDOW = BEFORE + 1 + AFTER
LATENTS_AT_ONCE = 4096
"""Whose windows are looked up at a time: looking up takes about 20 KiB for each, and keeping them a tenth of that."""
STRETCH = 64
"""At most one context is shown per stretch of this many tokens. Otherwise one passage could fill the list."""


@dataclass(frozen=True)
class Contexts:
    """C places for each of L latents: first the strongest, then a sample of all weaker ones."""

    places_LC: np.ndarray
    """int64, strongest first, padded with -1."""
    acts_LC: np.ndarray
    """float32: the activation at the place."""
    acts_LCW: np.ndarray
    """float32 `[L, C, WINDOW]`: the latent's activations from `BEFORE` tokens before the place to `AFTER` after it. 0
    beyond the ends of the sequence."""


def find_contexts(codes: Codes, latents_L: np.ndarray, ctx_len: int, top: int, spread: int) -> Contexts:
    """Find the places to show for each latent.

    Args:
        codes: The SAE's firings.
        latents_L: Indices of latents, int64.
        ctx_len: T, tokens per sequence.
        top: How many of the strongest places.
        spread: How many weaker places, evenly spaced by rank.
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
    """Return each latent's strongest place in each stretch: latents, places, activations. Strongest first."""
    per_sequence = -(-ctx_len // STRETCH)
    stretch_P = codes.places_P // ctx_len * per_sequence + codes.places_P % ctx_len // STRETCH
    # Firings are sorted by latent and place, so a latent's firings in one stretch are adjacent.
    new_P = np.ones(len(stretch_P), bool)
    new_P[1:] = (np.diff(stretch_P) != 0) | (np.diff(codes.latents_P) != 0)
    group_P = np.cumsum(new_P) - 1
    best_P = np.lexsort((codes.places_P, -codes.acts_P, group_P))
    best_B = best_P[np.flatnonzero(new_P)]
    order = np.lexsort((-codes.acts_P[best_B], codes.latents_P[best_B]))
    best_B = best_B[order]
    return codes.latents_P[best_B], codes.places_P[best_B], codes.acts_P[best_B]


def _first(found_L: np.ndarray, number: int) -> np.ndarray:
    """Return ranks 0, 1, ..., padded with -1 beyond the number found: int64 `[L, number]`."""
    ranks = np.broadcast_to(np.arange(number), (len(found_L), number))
    return np.where(ranks < found_L[:, None], ranks, -1)


def _spread(found_L: np.ndarray, number: int) -> np.ndarray:
    """Return evenly spaced ranks, the middle of each of `number` equal parts, or all ranks if there are no more."""
    found_L1 = np.maximum(found_L, 0)[:, None]
    parts = ((np.arange(number) + 0.5) / max(number, 1) * found_L1).astype(np.int64)
    return np.where(found_L1 > number, parts, _first(found_L, number))


def _windows(codes: Codes, latents_L: np.ndarray, places_LC: np.ndarray, ctx_len: int) -> np.ndarray:
    acts_LCW = np.zeros((*places_LC.shape, WINDOW), np.float32)
    for start in range(0, len(latents_L), LATENTS_AT_ONCE):
        some = slice(start, start + LATENTS_AT_ONCE)
        peaks = places_LC[some, :, None]
        places = peaks + np.arange(-BEFORE, AFTER + 1)
        same_sequence = (peaks >= 0) & (places // ctx_len == peaks // ctx_len)
        acts = codes.at(latents_L[some, None, None], np.where(same_sequence, places, 0))
        acts_LCW[some] = np.where(same_sequence, acts, np.float32(0))
    return acts_LCW
