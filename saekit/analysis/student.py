"""The quantile of Student's t distribution for 95% confidence intervals.

Sources: Abramowitz & Stegun 1964, "Handbook of Mathematical Functions", formulas 26.7.3, 26.7.4 and 26.7.5.
"""

from __future__ import annotations

import math
from functools import cache

Z = 1.959963984540054
"""The same quantile of the normal distribution, the limit for infinitely many degrees of freedom."""
EXACT_UP_TO = 200
"""Degrees of freedom above which the expansion's error is below 1e-10."""


@cache
def standard_errors(freedom: int) -> float:
    """Return the half width of a mean's 95% interval in standard errors: the 0.975 quantile of t.

    Args:
        freedom: ν, the degrees of freedom: the number of values minus one, at least 1.
    """
    if freedom > EXACT_UP_TO:
        return _expansion(freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(theta: float, freedom: int) -> float:
    """Compute P(|t| < √ν tan θ) by the finite sums 26.7.3 (ν odd) and 26.7.4 (ν even)."""
    cosine, sine = math.cos(theta), math.sin(theta)
    odd = freedom % 2
    term, total = cosine**odd, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * cosine**2
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def _expansion(freedom: int) -> float:
    """Sum the first terms of the quantile's series in 1/ν, 26.7.5."""
    z = Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
