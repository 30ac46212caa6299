"""The protocol of file formats, and the search for folders in a format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from saekit.registry import FORMATS
from saekit.sae.model import Sae
from saekit.sae.storage import CONFIG_FILE, LATEST, sae_folders_below


class Format:
    """Reads and writes one SAE in a folder.

    A format is a subclass in its own file, registered under its `name` in `saekit.registry.FORMATS`. It implements
    `recognizes`, and `read`, `write` or both. It has no state.
    """

    name: ClassVar[str]
    """The name in `saekit.save(..., format=name)`."""
    looks_for: ClassVar[str]
    """The files by which it recognizes a folder, for messages: `sae.safetensors`."""

    def recognizes(self, folder: Path) -> bool:
        """Return whether a folder holds one SAE in this format.

        Look only at the names of files and the keys of a small JSON file (`config_of`), and run no code from the
        folder. If possible, recognize a damaged folder too, so that `read` can say what is wrong with it.
        """
        raise NotImplementedError(f"{type(self).__qualname__} does not say which folders it recognizes")

    def read(self, folder: Path, device: torch.device | str = "cpu") -> Sae:
        """Read the SAE in a folder that this format recognizes.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, or describes an SAE that `Sae` cannot compute exactly.
        """
        raise ValueError(f"saekit can write the format {self.name}, but cannot read it")

    def write(self, sae: Sae, folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write an SAE into a folder.

        Args:
            sae: The SAE.
            folder: Where the files go. Created if it does not exist.
            metadata: Further information for readers, such as the language model's name, as plain values.

        Raises:
            ValueError: If the format cannot express this SAE or its metadata. Nothing is written then.
        """
        raise ValueError(f"saekit can read the format {self.name}, but cannot write it")


def formats(name: str | None = None) -> list[Format]:
    """Return all formats, or only the one of this name.

    Raises:
        UserError: If there is no format of this name.
    """
    return [FORMATS.get(each)() for each in (FORMATS.names() if name is None else (name,))]


def format_of(folder: Path, name: str | None = None) -> Format | None:
    """Return the format that recognizes a folder, or None.

    Args:
        folder: The folder.
        name: The only format to try. By default all.

    Raises:
        ValueError: If several formats recognize the folder.
    """
    found = [each for each in formats(name) if each.recognizes(folder)]
    if len(found) > 1:
        several = " and as ".join(each.name for each in found)
        raise ValueError(f"{folder} can be read as {several}: choose one with format={found[0].name!r}")
    return found[0] if found else None


def find_folders(path: Path, name: str | None = None) -> dict[str, Path]:
    """Find every SAE folder of a run (its latest checkpoint) or below a folder, by hookpoint, in natural order.

    Args:
        path: The folder.
        name: The only format to search for. By default all.

    Raises:
        FileNotFoundError: If there is none.
    """
    wanted = formats(name)
    latest = path / LATEST
    found = sae_folders_below(
        latest if latest.is_dir() else path, lambda folder, _: any(each.recognizes(folder) for each in wanted)
    )
    if not found:
        files = ", ".join(f"{each.looks_for} ({each.name})" for each in wanted)
        raise FileNotFoundError(f"no SAE in {path}: neither it nor a folder below it contains {files}")
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `cfg.json`. Empty if the file is missing or is not a JSON object."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
