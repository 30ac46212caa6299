"""Small pictures made of block characters: trends and histograms that fit into a table cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
GAP = "·"
"""Drawn where a value is missing: None, NaN, infinite, or not positive on a log scale."""

MIN_RATIO = 1.1
"""A trend whose largest value is less than this times its smallest one does not fill the height: noise stays low."""

TO_ASCII = str.maketrans(
    dict(zip(BLOCKS, "_.,-=+*#", strict=True))
    | {
        GAP: ".",
        "–": "-",
        "…": "...",
        "×": "x",
        "≤": "<=",
        "→": "->",
        "─": "-",
        "┼": "+",
        "├": "+",
        "┤": "+",
        "✓": "*",
        "‖": "|",
    }
)
"""Stand-ins for output whose encoding knows none of these characters."""


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Return a trend on a log scale, oldest value first, scaled to its own smallest and largest value.

    Equal heights are equal ratios, so halving FVU takes the same drop early and late. Where the values differ by less
    than `MIN_RATIO`, they are drawn about the middle at that fixed scale instead.

    Args:
        values: Any number of values.
        width: Longest result, in characters; more values than that are averaged in equal runs (geometric mean).

    Returns:
        At most `width` characters; empty when there are no values.
    """
    logs = [_log(value) for value in values]
    if len(logs) > width:
        edges = [round(i * len(logs) / width) for i in range(width + 1)]
        logs = [_mean(logs[a:b]) for a, b in pairwise(edges)]
    known = [x for x in logs if x is not None]
    if not known:
        return GAP * len(logs)
    low, high = min(known), max(known)
    slack = math.log(MIN_RATIO) - (high - low)
    if slack > 0:
        low, high = low - slack / 2, high + slack / 2
    return "".join(GAP if x is None else _block((x - low) / (high - low)) for x in logs)


def bars(counts: Sequence[int], rows: int = 1) -> list[str]:
    """Return a histogram as lines of text, the top line first, one character per bin.

    Heights are linear in the counts, and the largest fills the height. An empty bin is blank; a bin that holds
    anything shows at least the lowest block.

    Args:
        counts: How many fall into each bin.
        rows: Height in lines.
    """
    top = max(counts, default=0)
    eighths = [0 if n == 0 else max(1, round(8 * rows * n / top)) for n in counts]
    return ["".join(_slice(h - 8 * row) for h in eighths) for row in reversed(range(rows))]


def _log(value: float | None) -> float | None:
    return math.log(value) if value is not None and math.isfinite(value) and value > 0 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def _block(height: float) -> str:
    """Return the block for a height from 0 to 1."""
    return BLOCKS[min(len(BLOCKS) - 1, int(height * len(BLOCKS)))]


def _slice(eighths: int) -> str:
    """Return the part of a bar that falls into one line, of height `eighths` above the line's foot."""
    return " " if eighths <= 0 else BLOCKS[min(eighths, 8) - 1]
