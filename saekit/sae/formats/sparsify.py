"""sparsify's format, which is also ours: what checkpoints hold. `saekit.sae.storage` reads and writes its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from saekit.sae.formats.base import Format, config_of
from saekit.sae.model import Sae
from saekit.sae.storage import WEIGHTS_FILE


class Sparsify(Format):
    """`cfg.json` and `sae.safetensors`.

    Every `Sae` can be written. sparsify itself reads those with TopK and GroupMax.
    """

    name: ClassVar[str] = "sparsify"
    looks_for: ClassVar[str] = WEIGHTS_FILE

    def recognizes(self, folder: Path) -> bool:
        """Look for `sae.safetensors`, or for a `cfg.json` with the sizes that sparsify has."""
        if (folder / WEIGHTS_FILE).is_file():
            return True
        keys = config_of(folder).keys()
        return {"d_in", "k"} <= keys and not keys & {"architecture", "d_sae"}  # those are SAELens'

    def read(self, folder: Path, device: torch.device | str = "cpu") -> Sae:
        """Read the files of saekit or of sparsify."""
        return Sae.load_from_disk(folder, device)

    def write(self, sae: Sae, folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the files that a checkpoint has of an SAE.

        Raises:
            ValueError: If there is metadata, for which the format has no place.
        """
        if metadata:
            raise ValueError(f"the format sparsify has no place for metadata ({', '.join(metadata)}): leave it out")
        sae.save_to_disk(folder)
