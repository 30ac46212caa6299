"""The format of sparsify, which is also that of our checkpoints. `saekit.sae.storage` reads and writes the files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from saekit.sae.formats.base import Format, config_of
from saekit.sae.model import Sae
from saekit.sae.storage import WEIGHTS_FILE


class Sparsify(Format):
    """Reads and writes `cfg.json` and `sae.safetensors`.

    It can write every `Sae`. sparsify itself can read those with TopK and GroupMax.
    """

    name: ClassVar[str] = "sparsify"
    looks_for: ClassVar[str] = WEIGHTS_FILE

    def recognizes(self, folder: Path) -> bool:
        """Look for `sae.safetensors`, or for a `cfg.json` with sparsify's keys for sizes."""
        if (folder / WEIGHTS_FILE).is_file():
            return True
        keys = config_of(folder).keys()
        return {"d_in", "k"} <= keys and not keys & {"architecture", "d_sae"}  # the latter are SAELens' keys

    def read(self, folder: Path, device: torch.device | str = "cpu") -> Sae:
        """Read an SAE written by saekit or sparsify."""
        return Sae.load_from_disk(folder, device)

    def write(self, sae: Sae, folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write an SAE's files as in a checkpoint.

        Raises:
            ValueError: If metadata is given: the format has no place for it.
        """
        if metadata:
            raise ValueError(f"the format sparsify cannot store metadata ({', '.join(metadata)}): leave it out")
        sae.save_to_disk(folder)
