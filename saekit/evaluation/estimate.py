"""A number from a sample of sequences, and how far from it the truth may lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

Z = 1.959963984540054
"""Standard errors on each side of a 95% interval."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval over sequences."""

    value: float
    low: float | None
    """None with a single sequence, which tells nothing of how others differ."""
    high: float | None

    def complement(self) -> Estimate:
        """One minus it."""
        low, high = (None if end is None else 1 - end for end in (self.high, self.low))
        return Estimate(1 - self.value, low, high)


def ratio(numerator_S: Tensor, denominator_S: Tensor) -> Estimate:
    """Σ numerator / Σ denominator over sequences, with an interval by linearisation.

    Tokens of one sequence are alike, so it is sequences that count as drawn independently, and their sums over tokens
    that vary. The variance is that of the classical ratio estimator (Cochran 1977, "Sampling Techniques", section
    6.4): `Σ (aₛ − R bₛ)² · S / (S − 1) / (Σ bₛ)²`.

    Args:
        numerator_S: `[S]`, a sum over each sequence's tokens.
        denominator_S: `[S]`: what it is divided by; a count of tokens, say.

    Returns:
        NaN with no interval where the denominators sum to zero.
    """
    a_S, b_S = numerator_S.double(), denominator_S.double()
    total, count = float(b_S.sum()), len(b_S)
    if total == 0:
        return Estimate(math.nan, None, None)
    value = float(a_S.sum()) / total
    if count < 2:
        return Estimate(value, None, None)
    variance = float((a_S - value * b_S).square().sum()) * count / (count - 1) / total**2
    half = Z * math.sqrt(variance)
    return Estimate(value, value - half, value + half)
