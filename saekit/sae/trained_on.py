"""The language model and hookpoint that an SAE was trained on, and whether it is used there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

TRAINED_ON = "trained_on"
"""The entry of `cfg.json` for it, in an SAE that is saved by itself."""
IN_CACHE = re.compile(r"models--([^/\\]+?)--([^/\\]+)")
"""Matches the name of a folder in the hub's cache, and captures the repository's owner and name."""


class TrainedOn(NamedTuple):
    """The language model and hookpoint that an SAE was trained on, as far as its files say."""

    model: str | None
    """The model's hub id or folder."""
    hookpoint: str | None
    """The hookpoint's name, as in `saekit.activations.hookpoints`: `layers.3`."""
    other: str | None = None
    """The second language model's hub id or folder, for a crosscoder of two models."""

    def is_at(self, hookpoint: str) -> bool:
        """Return whether the SAE may have been trained at this hookpoint. sparsify's suffix `/seed1` is ignored."""
        return self.hookpoint is None or self.hookpoint.partition("/")[0] == hookpoint.partition("/")[0]

    def is_of(self, name: str | None, kind: str) -> bool:
        """Return whether the SAE may have been trained on this language model.

        Args:
            name: The model's hub id or folder. Empty for a model made in memory, which may be any model.
            kind: The name of the model's class. Training records it for a model without a name.
        """
        return self.model in (None, kind) or not name or same_model(str(self.model), name)

    def is_of_other(self, name: str | None, kind: str) -> bool:
        """Return whether this language model may be the second one. See `is_of`."""
        return self.other in (None, kind) or not name or same_model(str(self.other), name)

    def entries(self) -> dict[str, str | None]:
        """Return the entries for `cfg.json`."""
        return {name: value for name, value in self._asdict().items() if value is not None or name != "other"}


def same_model(one: str, other: str) -> bool:
    """Return whether two names, hub ids or folders, may mean the same language model.

    A folder may have been moved or copied, and a hub id may lack its owner. In these cases only the last components of
    the names are compared.
    """
    if one == other:
        return True
    folders = [Path(name).expanduser() for name in (one, other)]
    if all(folder.is_dir() for folder in folders):
        return os.path.samefile(*folders)
    names = [_hub_id(name).lower() for name in (one, other)]
    if all(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) for name in names):
        return names[0] == names[1]
    return names[0].split("/")[-1] == names[1].split("/")[-1]


def _hub_id(name: str) -> str:
    """Return the hub id of a folder in the hub's cache, or any other name without its trailing slash."""
    cached = IN_CACHE.search(name)
    return f"{cached[1]}/{cached[2]}" if cached else name.rstrip("/")
