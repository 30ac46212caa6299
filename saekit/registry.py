"""Registries of selections, sources, placements and formats by name, for built-in kinds and plug-ins.

A built-in kind is a line in the tables at the end of this file, which says where to import it from. Listing the names
imports nothing. Another package registers a kind with an entry point in the table's group (`saekit.selections`, ...). A
plug-in file calls `register`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from saekit.errors import UserError

Kind = TypeVar("Kind")


class Registry:
    """Looks up kinds of one sort by name.

    Args:
        group: The entry points' group, such as `saekit.selections`.
        noun: The word for a kind in messages, such as `selection`.
        built_in: The location of each built-in kind, as `package.module:Name`.
    """

    def __init__(self, group: str, noun: str, built_in: dict[str, str]) -> None:
        self.group = group
        self.noun = noun
        self._built_in = built_in
        self._registered: dict[str, Any] = {}
        self._origin: dict[str, str] = {}

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        return {each.name: each for each in entry_points(group=self.group)}

    def names(self) -> tuple[str, ...]:
        """Return all names: built-in kinds first, then those of installed packages, then those of plug-ins."""
        return tuple(dict.fromkeys((*self._built_in, *self._installed, *self._registered)))

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._registered or name in self._installed

    def get(self, name: str) -> Any:
        """Return the kind of this name, importing it if necessary.

        Raises:
            UserError: If there is no kind of this name, or if the package that provides it cannot be imported.
        """
        if name in self._built_in:
            module, _, attribute = self._built_in[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        if name in self._registered:
            return self._registered[name]
        if name in self._installed:
            try:
                return self._installed[name].load()
            except Exception as error:  # somebody else's code
                raise UserError(f"{self.noun} {name!r} of an installed package cannot be imported: {error}") from error
        raise UserError(
            f"there is no {self.noun} {name!r}: choose one of {', '.join(self.names())}, or pass the file that "
            "registers it with --plugin"
        )

    def register(self, name: str) -> Callable[[type[Kind]], type[Kind]]:
        """Return a decorator that adds a class under a name.

        Raises:
            ValueError: If a built-in kind or another plug-in has this name.
        """

        def add(kind: type[Kind]) -> type[Kind]:
            if name in self._built_in or self._registered.get(name, kind).__qualname__ != kind.__qualname__:
                raise ValueError(f"there is already a {self.noun} {name!r}: choose another name")
            self._registered[name] = kind
            self._origin[name] = str(getattr(sys.modules.get(kind.__module__), "__file__", None) or kind.__module__)
            return kind

        return add

    def origin(self, name: str) -> str | None:
        """Return where a kind comes from: a plug-in's file or an installed package; None if it is built in."""
        if name in self._registered:
            return self._origin[name]
        found = self._installed.get(name)
        return found.value if found is not None and name not in self._built_in else None


SELECTIONS = Registry(
    "saekit.selections",
    "selection",
    {
        "topk": "saekit.sae.selection.topk:TopK",
        "batchtopk": "saekit.sae.selection.batchtopk:BatchTopK",
        "groupmax": "saekit.sae.selection.groupmax:GroupMax",
    },
)
SOURCES = Registry(
    "saekit.sources",
    "source",
    {"live": "saekit.training.live:open_live", "cached": "saekit.training.cached:open_cached"},
)
PLACEMENTS = Registry(
    "saekit.placements",
    "placement",
    {
        "single": "saekit.placement.local:Single",
        "ddp": "saekit.placement.ddp:Ddp",
        "layer-map": "saekit.placement.layer_map:LayerMap",
        "zero3": "saekit.placement.zero3:Zero3",
    },
)
FORMATS = Registry(
    "saekit.formats",
    "format",
    {"sparsify": "saekit.sae.formats.sparsify:Sparsify", "saelens": "saekit.sae.formats.saelens:SaeLens"},
)


def load_plugin(file: Path) -> None:
    """Run a plug-in, a Python file that registers kinds. A second call with the same file does nothing.

    Raises:
        UserError: If the file does not exist, is not a Python file, or raises an error.
    """
    path = Path(os.path.expanduser(file))  # unlike Path.expanduser, raises nothing if the user does not exist
    if not os.path.isfile(path):
        raise UserError(f"--plugin {file}: there is no such file")
    path = path.resolve()
    name = f"saekit_plugin_{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody else's code
        del sys.modules[name]
        raise UserError(f"--plugin {file}: {type(error).__name__}: {error}") from error
