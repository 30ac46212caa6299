"""Finding what a run can go on from: the newest checkpoint that is whole."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from saekit.errors import UserError, first_line
from saekit.runs.checkpoint import numbered, put_in_place
from saekit.runs.files import is_as_listed
from saekit.runs.index import damage_of
from saekit.runs.layout import FORMAT, INDEX_FILE, STATE_FILE, is_checkpoint, partial_folders, run_of


@dataclass(frozen=True)
class Found:
    """A whole checkpoint."""

    folder: Path
    index: dict[str, Any]
    """The content of its `checkpoint.json`."""
    passed_over: tuple[str, ...] = ()
    """The damage of each newer checkpoint."""


def find_checkpoint(path: Path) -> Found:
    """Return the checkpoint to go on from: the one that `path` is, or the newest whole one of the run that it is.

    Every byte is compared with its checksum. A checkpoint that was whole, but not in its place when its writer died,
    is put there.

    Raises:
        UserError: If there is no whole one; the message says what is wrong with each. If `path` is one checkpoint and
            that is damaged, no other is taken in its stead, but the message names the newest whole one.
    """
    if is_checkpoint(path):
        try:
            folder = path.resolve() if path.is_symlink() else path
            return Found(folder, read_index(folder))
        except UserError as damage:
            try:
                whole = f"; the newest whole checkpoint is {_newest_whole(run_of(path)).folder}"
            except UserError:
                whole = ""
            raise UserError(f"{damage}{whole}") from None
    _settle(run_of(path))
    return _newest_whole(run_of(path))


def _settle(run_dir: Path) -> None:
    for partial in partial_folders(run_dir):
        with suppress(UserError):  # what is not whole is the next save's to delete
            read_index(partial)
            put_in_place(partial)


def _newest_whole(run_dir: Path) -> Found:
    damage: list[str] = []
    for folder, _ in reversed(numbered(run_dir)):
        try:
            return Found(folder, read_index(folder), tuple(damage))
        except UserError as error:
            damage.append(str(error))
    raise UserError("; ".join(damage) or f"{run_dir} has no checkpoint")


def read_index(checkpoint: Path) -> dict[str, Any]:
    """Return the content of `checkpoint.json`, after checking that every file it names is there and whole.

    Raises:
        UserError: If the index or a file is missing or damaged; the message names it.
    """
    try:
        index = json.loads((checkpoint / INDEX_FILE).read_text(encoding="utf-8"))
        files, version = dict(index["files"]), index["format"]
    except OSError as error:
        raise UserError(f"checkpoint {checkpoint} is incomplete: {INDEX_FILE} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"checkpoint {checkpoint} is damaged: {INDEX_FILE} is not an index") from None
    if version != FORMAT:
        raise UserError(
            f"checkpoint {checkpoint} has format {version!r}, and this version of saekit resumes only from format "
            f"{FORMAT}: use the version that wrote it"
        )
    if damage := damage_of(index):
        raise UserError(f"checkpoint {checkpoint} is damaged: {INDEX_FILE}: {damage}")
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"checkpoint {checkpoint} is incomplete: {name} is missing")
        try:
            whole = is_as_listed(file, expected)
        except OSError as error:
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} cannot be read ({error.strerror})") from None
        if not whole:
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} has changed")
    return index


def read_state(folder: Path, names: Collection[str] | None = None, if_there: Collection[str] = ()) -> dict[str, Tensor]:
    """A layer's counters, calibration and optimizer state, on the CPU; only those of some names, if they are given.

    What is in `if_there` may be missing, as `max_norm` is where a layer has no limit.
    """
    try:
        if names is None:
            return load_file(folder / STATE_FILE)
        with safe_open(folder / STATE_FILE, "pt") as file:
            found = [name for name in if_there if name in file.keys()]  # noqa: SIM118  # it is no dictionary
            return {name: file.get_tensor(name) for name in (*names, *found)}
    except (OSError, SafetensorError) as error:
        said = first_line(error)
        raise UserError(f"{folder / STATE_FILE} cannot be read ({said}): use another checkpoint") from None
