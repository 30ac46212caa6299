"""What an SAE was trained on, and whether it is used there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

TRAINED_ON = "trained_on"
"""The entry of `cfg.json` in which an SAE that is saved by itself keeps it."""
IN_CACHE = re.compile(r"models--([^/\\]+?)--([^/\\]+)")
"""A folder of the hub's cache, which has the repository's owner and name in its own."""


class TrainedOn(NamedTuple):
    """The language model and the place in it on whose activations an SAE was trained, as far as its files say."""

    model: str | None
    """A hub id or a folder."""
    hookpoint: str | None
    """As `saekit.activations.hookpoints` names it: `layers.3`."""
    other: str | None = None
    """The second language model, if it is a crosscoder of two."""

    def is_at(self, hookpoint: str) -> bool:
        """Tell whether a hookpoint may be the one; sparsify's `/seed1` at the end of a name does not matter."""
        return self.hookpoint is None or self.hookpoint.partition("/")[0] == hookpoint.partition("/")[0]

    def is_of(self, name: str | None, kind: str) -> bool:
        """Tell whether a language model may be the one.

        Args:
            name: Its hub id or folder; empty for a model that was made in memory, which may be any.
            kind: The name of its class, which stood for a model without a name in training.
        """
        return self.model in (None, kind) or not name or same_model(str(self.model), name)

    def is_of_other(self, name: str | None, kind: str) -> bool:
        """Tell whether a language model may be the second one; see `is_of`."""
        return self.other in (None, kind) or not name or same_model(str(self.other), name)

    def entries(self) -> dict[str, str | None]:
        """Return what a file keeps of it."""
        return {name: value for name, value in self._asdict().items() if value is not None or name != "other"}


def same_model(one: str, other: str) -> bool:
    """Tell whether two names, hub ids or folders, may mean the same language model.

    A folder may have been moved or copied, and a hub id may be without its owner: then the last parts are compared.
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
    """Return the hub id that a folder of the hub's cache is of; other names without a slash at their end."""
    cached = IN_CACHE.search(name)
    return f"{cached[1]}/{cached[2]}" if cached else name.rstrip("/")
