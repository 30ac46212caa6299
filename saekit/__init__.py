"""Train k-sparse autoencoders on every layer of a language model's residual stream, all layers at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saekit._version import __version__

if TYPE_CHECKING:
    from saekit.activations import splice, tap
    from saekit.config import RunConfig, SaeConfig, TrainConfig
    from saekit.errors import UserError
    from saekit.sae import Sae
    from saekit.training import SaeTrainer

__all__ = ["RunConfig", "Sae", "SaeConfig", "SaeTrainer", "TrainConfig", "UserError", "__version__", "splice", "tap"]

_HOMES = {
    "RunConfig": "saekit.config",
    "SaeConfig": "saekit.config",
    "TrainConfig": "saekit.config",
    "UserError": "saekit.errors",
    "Sae": "saekit.sae",
    "SaeTrainer": "saekit.training",
    "splice": "saekit.activations",
    "tap": "saekit.activations",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: `saekit --help` must not wait for them.
    if name not in _HOMES:
        raise AttributeError(f"module 'saekit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
