"""Activations on disk: written once by `saekit cache`, trained on as often as wanted with `--activations`."""

from saekit.cache.index import Index, read_index
from saekit.cache.source import Cached

__all__ = ["Cached", "Index", "read_index"]
