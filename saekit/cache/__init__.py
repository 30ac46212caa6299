"""Activations on disk: written once by `saekit cache`, trained on as often as wanted with `--activations`."""

from saekit.cache.index import Index, read_index
from saekit.cache.source import Cached, read_options

__all__ = ["Cached", "Index", "read_index", "read_options"]
