"""From what a caller of the API names, a folder or a repository on the hub, to its SAEs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saekit.errors import UserError, first_line
from saekit.hub import is_path, path_of
from saekit.runs.opening import open_sae, user_errors
from saekit.sae import Sae
from saekit.sae.formats.base import find_folders, format_of
from saekit.sae.storage import download_folder, hookpoint_name


class Opening:
    """What `saekit.load` and `load_many` were asked for; their docstrings describe the arguments.

    Raises:
        UserError: If `path` names nothing, or the device is not there.
    """

    def __init__(
        self,
        path: str | Path,
        device: torch.device | str,
        format: str | None,
        verify: bool,
        hub_options: Mapping[str, Any],
    ) -> None:
        self.path = path
        self.device = _checked(device)
        self.format = format
        self.verify = verify
        self.hub_options = hub_options
        self.local = _local_folder(path, hub_options)

    def one(self, hookpoint: str | None) -> Sae:
        """Open one SAE; see `saekit.load`."""
        with user_errors():
            folder = self.local
            if folder is None:
                folder, hookpoint = download_folder(str(self.path), hookpoint, **self.hub_options), None
            if format_of(folder, self.format) is not None:
                if hookpoint not in (None, hookpoint_name(folder.resolve().name)):
                    raise UserError(
                        f"{self.path} is the folder of one SAE, not of {hookpoint}: leave out the hookpoint"
                    )
                return self._open(folder)
            folders = find_folders(folder, self.format)
            if hookpoint is None and len(folders) == 1:
                (hookpoint,) = folders
            if hookpoint not in folders:
                problem = "has several SAEs" if hookpoint is None else f"has no SAE {hookpoint!r}"
                raise UserError(f"{self.path} {problem}: choose one of {', '.join(folders)}")
            return self._open(folders[hookpoint])

    def all(self) -> dict[str, Sae]:
        """Open every SAE; see `saekit.load_many`."""
        with user_errors():
            folder = self.local or download_folder(str(self.path), **self.hub_options)
            return {name: self._open(each) for name, each in find_folders(folder, self.format).items()}

    def _open(self, folder: Path) -> Sae:
        return open_sae(folder, self.device, format=self.format, verify=self.verify)


def _checked(device: torch.device | str) -> torch.device:
    try:
        checked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device {device!r}: {first_line(error)}") from None
    if checked.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {str(device)!r}: this machine has no CUDA GPU")
    return checked


def _local_folder(path: str | Path, hub_options: Mapping[str, Any]) -> Path | None:
    """Return the folder that a path means; None for a repository on the hub."""
    if not isinstance(path, (str, Path)):
        raise UserError(f"path is a {type(path).__name__}: give a folder or a hub id")
    folder = path_of(str(path))
    if folder.is_dir():
        if hub_options:
            raise UserError(f"{path} is a folder: {', '.join(hub_options)} are options for a repository on the hub")
        return folder
    if isinstance(path, Path) or is_path(path):
        raise UserError(f"{path}: there is no such folder")
    return None
