"""Format numbers for people to read, and parse numbers that people type.

Most functions that format a number show None and NaN as a dash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from saekit.errors import UserError

UNKNOWN = "–"
"""Shown in place of an unknown number."""
SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def unknown(value: float | None) -> bool:
    """Return whether there is no number to show: it is None, NaN or infinite."""
    return value is None or not math.isfinite(value)


def short_count(value: float | None) -> str:
    """Format a count with three significant digits: `950`, `12.3k`, `4.56M`, `1.20B`."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # Show 999 950 as 1.00M, not as 1000k.
        if abs(value) >= size * 0.9995:
            scaled = value / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(abs(scaled), 1))))}f}{unit}"
    return f"{value:.0f}"


def count(value: int | None) -> str:
    """Format a whole number with thousands separators: `16,384`."""
    return UNKNOWN if value is None else f"{value:,}"


def percent(fraction: float | None) -> str:
    """Format a fraction from 0 to 1 as a percentage. A small nonzero one is shown as `<0.1%`."""
    if fraction is None or not math.isfinite(fraction):
        return UNKNOWN
    if 0 < fraction < 0.0005:
        return "<0.1%"
    return f"{100 * fraction:.1f}%"


def decimal(value: float | None, digits: int = 4) -> str:
    """Format a number with fixed `digits`, or in exponent form from 10 000 on, so that it fits its column."""
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def scientific(value: float | None) -> str:
    """Format a number with two significant digits and an exponent: `2.0e-04`."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:.1e}"


def size(n_bytes: float | None) -> str:
    """Format a number of bytes in binary units: `3.2 GiB`."""
    if n_bytes is None or not math.isfinite(n_bytes):
        return UNKNOWN
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB", "MiB") else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float | None) -> str:
    """Format seconds in their two largest units: `42s`, `3m 05s`, `2h 07m`, `4d 11h`."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def active(k: int | None, activation: str | None) -> str:
    """Format k, and the selection unless it is TopK: `32`, `32 (batchtopk)`."""
    return count(k) if activation in (None, "topk") else f"{count(k)} ({activation})"


def parse_count(option: str, text: str) -> int:
    """Parse a count: `"100M"`, `"1e8"`, `"100,000,000"` and `"100_000_000"` all give 100000000.

    Raises:
        UserError: If it is not a whole number above zero. The message names `option`.
    """
    plain = re.sub(r"(?<=\d)[,_ ](?=\d{3})", "", text.strip().upper())
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:E\+?\d{1,2})?) ?([KMBT]?)", plain)
    number = float(found[1]) * COUNTS[found[2]] if found else 0.0
    if number < 1 or number != int(number):
        raise UserError(f"{option} {text!r}: expected a whole number such as 100M, 1e8 or 100,000,000")
    return int(number)


def show_count(number: int) -> str:
    """Format a count exactly, with a unit if it is a multiple of it: `100M`, `1500`, `1234`."""
    for unit in ("T", "B", "M"):
        if number % COUNTS[unit] == 0:
            return f"{number // COUNTS[unit]}{unit}"
    return str(number)


def plural(number: int, word: str) -> str:
    """Format a count with its noun: `1 GPU`, `2 GPUs`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def parse_size(option: str, text: str) -> int:
    """Parse a size such as `"80GiB"`, `"80 GB"` or `"80G"` into bytes. A number below 10 000 without a unit is in GiB.

    Raises:
        UserError: If it is not a positive size. The message names `option`.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if found is None or not float(found[1]) or found[2] == "I":
        raise UserError(f"{option} {text!r}: expected a size such as 80GiB or 80GB")
    number, unit = float(found[1]), found[2]
    if not unit and number < 10_000:
        unit = "GI"
    return round(number * SIZES[unit])


def span(numbers: Collection[int]) -> str:
    """Format whole numbers as one number or a range: `4,096`, or `48 to 4,096` if they differ."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
