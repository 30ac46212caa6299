"""The one way to open a finished SAE: its files are compared with the checksums of the checkpoint that they lie in.

`--resume` compares a whole checkpoint (`recovery`). Here it is the files of one SAE that are about to be read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from saekit.errors import UserError, first_line
from saekit.runs.files import is_as_listed
from saekit.runs.index import ALL_THE_SAME, damage_of, is_ours
from saekit.runs.layout import ABOUT_FILE, FOREIGN_FILE, INDEX_FILE, STATE_FILE
from saekit.sae import Sae
from saekit.sae.formats.base import config_of, format_of, formats
from saekit.sae.storage import CONFIG_FILE, SEARCH_DEPTH, WEIGHTS_FILE, hookpoint_name
from saekit.sae.trained_on import TRAINED_ON, TrainedOn

OTHER_MODEL = "other_model"
"""The entry of a checkpoint's files with the name of the second of two language models."""
NOT_READ = (STATE_FILE,)
"""The file of a checkpoint that opening an SAE does not read. It is twice as large as the SAE."""


def open_sae(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    format: str | None = None,
    verify: bool = True,
    otherwise: str = ALL_THE_SAME,
) -> Sae:
    """Open the SAE in a folder, and note what it was trained on (`Sae.trained_on`).

    If the folder lies in a checkpoint, its files must have the checksums that the checkpoint lists. A folder that is in
    no checkpoint, or that the checkpoint does not list, is opened without: another tool's, one that `saekit.save`
    wrote, or one that was copied out of its checkpoint.

    Args:
        folder: The SAE's.
        device: Where the parameters go.
        format: The name of the format that it is in; by default the one that recognizes it.
        verify: Whether to compare the checksums.
        otherwise: The end of the message about a file that has changed: how to do without this check.

    Raises:
        UserError: If a file is missing, damaged or changed, or describes what saekit cannot compute.
    """
    if verify:
        check_contents(folder, otherwise=otherwise)
    with user_errors():
        kind = formats(format)[0] if format else format_of(folder)
        if kind is None:
            raise UserError(f"{folder} contains no SAE: saekit reads none of its files")
        sae = kind.read(folder, device)
    sae.trained_on = read_trained_on(folder)
    return sae


@contextmanager
def user_errors() -> Iterator[None]:
    """Raise what files and the hub raise as a `UserError` of one sentence."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(first_line(error)) from error


def check_contents(folder: Path, *, without: Collection[str] = NOT_READ, otherwise: str = ALL_THE_SAME) -> None:
    """Compare the files of an SAE's folder with what the checkpoint that it lies in lists of them.

    Args:
        folder: The SAE's.
        without: Names of files that are not compared.
        otherwise: See `open_sae`.

    Raises:
        UserError: If a file is missing or has changed, or the list itself is damaged.
    """
    for file, relative in _indexes(folder):
        try:
            index = json.loads(file.read_bytes())
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}){otherwise}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{file} is damaged: it is not JSON; copy the checkpoint again{otherwise}") from None
        listed = _listed(file, index, relative, otherwise)
        for name, expected in listed.items():
            if name not in without:
                _compare(folder / name, expected, otherwise)
        if listed:
            return


def _listed(file: Path, index: Any, relative: str, otherwise: str) -> dict[str, Any]:
    """Return what a checkpoint lists of the files in one of its folders, by name; empty if it lists none."""
    if not is_ours(index):
        return {}  # another tool's file of that name
    files, names, inside = index.get("files"), index.get("hookpoints"), f"{relative}/"
    entries = files.items() if isinstance(files, dict) else ()
    own = {name.removeprefix(inside): facts for name, facts in entries if name.startswith(inside)}
    promised = isinstance(names, list) and hookpoint_name(relative) in names
    damage = damage_of(index)
    if damage is None and (promised or own) and not {CONFIG_FILE, WEIGHTS_FILE} <= own.keys():
        damage = f"it does not list the files of {relative}"
    if damage is not None:
        raise UserError(f"{file} is damaged: {damage}; copy the checkpoint again{otherwise}")
    return own


def _compare(file: Path, expected: Any, otherwise: str) -> None:
    if not file.is_file():
        raise UserError(f"{file} is missing, although {INDEX_FILE} lists it: copy the checkpoint again")
    try:
        same = is_as_listed(file, expected) or expected == {"bytes": file.stat().st_size}
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    if not same:
        raise UserError(
            f"{file} has changed since it was saved: {INDEX_FILE} has another size or checksum of it; copy the "
            f"checkpoint again{otherwise}"
        )


def _indexes(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the index of the checkpoint that an SAE's folder lies in, and the folder's path there.

    As the folder was named, through links such as `RUN/latest`, and where it really lies.
    """
    for path in dict.fromkeys((Path(os.path.abspath(folder)), folder.resolve())):
        for parent in list(path.parents)[:SEARCH_DEPTH]:
            if (parent / INDEX_FILE).is_file():
                yield parent / INDEX_FILE, path.relative_to(parent).as_posix()


def read_trained_on(folder: Path) -> TrainedOn | None:
    """Read on which model, and where in it, the SAE of a folder was trained; None if no file says so.

    Files that cannot be read are passed over: they are not part of the SAE.
    """
    about = _object(folder / ABOUT_FILE)
    kept = config_of(folder).get(TRAINED_ON)
    sources = [about, {**kept, OTHER_MODEL: kept.get("other")} if isinstance(kept, dict) else {}]
    for file, relative in _indexes(folder):
        index = _object(file)
        names = index.get("hookpoints")
        hookpoint = hookpoint_name(relative)
        promised = isinstance(names, list) and hookpoint in names
        names_of = {key: index.get(key) for key in ("model", OTHER_MODEL)}
        sources.append({**names_of, "hookpoint": hookpoint} if promised else {})
        break
    sources.append({"model": _object(folder.parent / FOREIGN_FILE).get("model")})  # sparsify's

    def first(key: str) -> str | None:
        return next((value for each in sources if isinstance(value := each.get(key), str) and value), None)

    known = TrainedOn(first("model"), first("hookpoint"), first(OTHER_MODEL))
    return known if any(known) else None


def _object(file: Path) -> dict[str, Any]:
    """Return a file's JSON object; empty if it holds none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
