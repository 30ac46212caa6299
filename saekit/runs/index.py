"""The checksum of a checkpoint's index: it finds damage in the list by which all other damage is found."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import xxhash

OWN = "checksum_of_the_rest"
"""The entry of `checkpoint.json` with the checksum of all others."""
ALL_THE_SAME = "; --no-verify (in Python verify=False) opens it anyway"
"""The end of a message about a change that a user may have made."""


def sealed(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return an index with its checksum."""
    return {**index, OWN: _checksum(index)}


def is_ours(index: Any) -> bool:
    """Tell whether the content of a `checkpoint.json` is an index, be it damaged: other tools may write such a file."""
    return isinstance(index, Mapping) and bool({"format", "files", "hookpoints", OWN} & index.keys())


def damage_of(index: Any) -> str | None:
    """Say what is wrong with the content of a `checkpoint.json`; None if it is as it was written.

    Development versions wrote no checksum: of such an index damage cannot be found.
    """
    if not isinstance(index, Mapping):
        return "it is not a JSON object"
    if OWN in index:
        return None if index[OWN] == _checksum(index) else "its content has changed since it was written"
    if any(isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) for value in index.values()):
        return f"its checksum is not named {OWN}"
    return None


def _checksum(index: Mapping[str, Any]) -> str:
    """Return the XXH3-128 of all entries but `OWN`, in an order and a spelling that reading them does not change."""
    rest = json.loads(json.dumps({key: value for key, value in index.items() if key != OWN}))
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
