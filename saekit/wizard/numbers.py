"""Counts as people type them."""

from __future__ import annotations

import re

from saekit.errors import UserError

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(option: str, text: str) -> int:
    """`"100M"`, `"1e8"`, `"100,000,000"` or `"100_000_000"` → 100000000.

    Raises:
        UserError: If it is not a whole number above zero; `option` is named in it.
    """
    plain = re.sub(r"(?<=\d)[,_ ](?=\d{3})", "", text.strip().upper())
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:E\+?\d{1,2})?) ?([KMBT]?)", plain)
    number = float(found[1]) * UNITS[found[2]] if found else 0.0
    if number < 1 or number != int(number):
        raise UserError(f"{option} {text!r}: expected a whole number such as 100M, 1e8 or 100,000,000")
    return int(number)


def show_count(number: int) -> str:
    """The shortest of these that is exact: `100M`, `1500`, `1234`."""
    for unit in ("T", "B", "M"):
        if number % UNITS[unit] == 0:
            return f"{number // UNITS[unit]}{unit}"
    return str(number)
