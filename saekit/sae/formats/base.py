"""The protocol of file formats, and which formats a folder is in."""

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
    """Keeps one SAE in a folder.

    A format is a subclass in a file of its own, registered under its `name` in `saekit.registry.FORMATS`. It must say
    which folders it recognizes, and implement `read`, `write` or both. It has no state.
    """

    name: ClassVar[str]
    """As in `saekit.save(..., format=name)`."""
    looks_for: ClassVar[str]
    """The file or files by which it recognizes a folder, for messages: `sae.safetensors`."""

    def recognizes(self, folder: Path) -> bool:
        """Tell whether a folder holds one SAE in this format.

        It looks at the names of files and at the keys of a small JSON file (`config_of`), and never runs what it finds.
        A damaged folder should be recognized where that is possible: then `read` can say what is wrong with it.
        """
        raise NotImplementedError(f"{type(self).__qualname__} does not say which folders it recognizes")

    def read(self, folder: Path, device: torch.device | str = "cpu") -> Sae:
        """Read the SAE in a folder that this format recognizes.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, or describes something that an `Sae` cannot compute exactly.
        """
        raise ValueError(f"saekit writes the format {self.name}, but does not read it")

    def write(self, sae: Sae, folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write an SAE into a folder, which is made if necessary.

        Args:
            sae: The SAE.
            folder: Where the files go.
            metadata: What readers should know besides, such as the language model's name: plain values.

        Raises:
            ValueError: Before anything is written, if the format cannot say something; the message names it.
        """
        raise ValueError(f"saekit reads the format {self.name}, but does not write it")


def formats(name: str | None = None) -> list[Format]:
    """Return every format there is, or the one of that name.

    Raises:
        UserError: If there is none of that name.
    """
    return [FORMATS.get(each)() for each in (FORMATS.names() if name is None else (name,))]


def format_of(folder: Path, name: str | None = None) -> Format | None:
    """Return the format that recognizes a folder; None if none does, or not the one of that name.

    Raises:
        ValueError: If several formats recognize it.
    """
    found = [each for each in formats(name) if each.recognizes(folder)]
    if len(found) > 1:
        several = " and as ".join(each.name for each in found)
        raise ValueError(f"{folder} can be read as {several}: choose one with format={found[0].name!r}")
    return found[0] if found else None


def find_folders(path: Path, name: str | None = None) -> dict[str, Path]:
    """Find every SAE folder of a run (its latest checkpoint) or below a folder, by hookpoint, naturally sorted.

    Args:
        path: The folder.
        name: Of the format to look for; by default any.

    Raises:
        FileNotFoundError: If there is none; the message says what was looked for.
    """
    wanted = formats(name)
    latest = path / LATEST
    found = sae_folders_below(
        latest if latest.is_dir() else path, lambda folder, _: any(each.recognizes(folder) for each in wanted)
    )
    if not found:
        files = ", ".join(f"{each.looks_for} ({each.name})" for each in wanted)
        raise FileNotFoundError(f"no SAE in {path}: neither it nor a folder below it has {files}")
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `cfg.json`; empty if there is no such file, or no JSON object in it."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
