"""Which versions a checkpoint was written with."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from saekit._version import __version__

SAEKIT = __version__
"""Our own."""


def library_versions() -> dict[str, str]:
    """Versions of what the result can depend on."""
    found = {"python": platform.python_version(), "saekit": SAEKIT}
    for name in ("torch", "transformers", "datasets", "accelerate", "safetensors", "deepspeed", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
