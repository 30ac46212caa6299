"""Train k-sparse autoencoders on every layer of a language model, all layers at once.

The names in this module are the API, which docs/api.md describes. Everything else is internal and may change in any
release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit._version import __version__

if TYPE_CHECKING:
    from saekit.activations import splice, tap
    from saekit.api import evaluate, load, load_many, save, train
    from saekit.config import DataConfig, ModelConfig, RunConfig, SaeConfig, TrainConfig
    from saekit.data import chunk_and_tokenize
    from saekit.errors import UserError
    from saekit.sae import Sae, save_as_saelens
    from saekit.training import SaeTrainer

__all__ = [
    "DataConfig",
    "ModelConfig",
    "RunConfig",
    "Sae",
    "SaeConfig",
    "SaeTrainer",
    "TrainConfig",
    "UserError",
    "__version__",
    "chunk_and_tokenize",
    "evaluate",
    "load",
    "load_many",
    "save",
    "save_as_saelens",
    "splice",
    "tap",
    "train",
]

_HOMES = {
    "DataConfig": "saekit.config",
    "ModelConfig": "saekit.config",
    "RunConfig": "saekit.config",
    "Sae": "saekit.sae",
    "SaeConfig": "saekit.config",
    "SaeTrainer": "saekit.training",
    "TrainConfig": "saekit.config",
    "UserError": "saekit.errors",
    "chunk_and_tokenize": "saekit.data",
    "evaluate": "saekit.api",
    "load": "saekit.api",
    "load_many": "saekit.api",
    "save": "saekit.api",
    "save_as_saelens": "saekit.sae",
    "splice": "saekit.activations",
    "tap": "saekit.activations",
    "train": "saekit.api",
}


if not TYPE_CHECKING:  # otherwise a type checker would accept any name

    def __getattr__(name: str) -> Any:
        # torch and transformers take seconds to import: `saekit --help` must not wait for them.
        if name not in _HOMES:
            raise AttributeError(f"module 'saekit' has no attribute {name!r}")
        import importlib
        import sys
        import warnings

        if "ipykernel" in sys.modules:  # tqdm warns if a notebook has no widgets for its bars; we show no such bars
            warnings.filterwarnings("ignore", message="IProgress not found")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
