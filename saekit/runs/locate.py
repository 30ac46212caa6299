"""Finds and reads the files of a checkpoint. Whatever is wrong with one becomes a sentence that names it."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from saekit.errors import UserError, first_line
from saekit.runs.checkpoint import numbered
from saekit.runs.index import ALL_THE_SAME, damage_of, is_ours
from saekit.runs.layout import CONFIG_FILE, FOREIGN_FILE, FORMAT, LATEST, METRICS_FILE, STEP_FOLDER
from saekit.runs.layout import INDEX_FILE as MANIFEST
from saekit.sae.storage import (
    SEARCH_DEPTH,
    folder_name,
    hookpoint_name,
    layer_number,
    natural_key,
    sae_folders_below,
)
from saekit.sae.storage import WEIGHTS_FILE as WEIGHTS


@dataclass(frozen=True)
class Location:
    """Where the SAEs are."""

    kind: str
    """The kind of path: "run", "checkpoint" or "sae"."""
    checkpoint: Path
    """The folder of the checkpoint; for a lone SAE its parent folder."""
    manifest: dict[str, Any]
    """The content of `checkpoint.json`, or of sparsify's `config.json`; empty without either."""
    saes: dict[str, Path]
    """Folder by hookpoint, in natural order; a folder the manifest promises is here even if it does not exist."""


def locate(path: Path, *, verify: bool = True) -> Location:
    """Find the SAEs of a run (its newest checkpoint), of a checkpoint, or of one SAE folder.

    Args:
        path: The folder.
        verify: Whether a checkpoint's index must have its own checksum.

    Raises:
        UserError: If there is none, if the path holds other checkpoints, or if the index is damaged.
    """
    # Not `resolve`: RUN/best/layers.0 belongs to the run, wherever the link leads.
    path = Path(os.path.abspath(path))
    try:
        if not path.is_dir():
            problem = "is not a folder" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}: give a run, one of its checkpoints, or an SAE's folder")
        if (path / WEIGHTS).is_file():
            return _lone_sae(path, verify)
        newest = None if (path / MANIFEST).exists() else _newest_checkpoint(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    checkpoint = newest or path
    manifest = _manifest(checkpoint, verify)
    found = _search(checkpoint, manifest)
    names = {*found, *_promised(manifest)}
    if not names:
        unsaved = (path / METRICS_FILE).exists() or (path / CONFIG_FILE).exists()
        reason = (
            "this run has not saved a checkpoint yet"
            if unsaved
            else f"no folder has a {WEIGHTS}, down to {SEARCH_DEPTH} levels below it"
        )
        raise UserError(f"{path} contains no SAE: {reason}")
    saes = {name: found.get(name, checkpoint / folder_name(name)) for name in sorted(names, key=natural_key)}
    return Location("run" if newest else "checkpoint", checkpoint, manifest, saes)


def check_files(location: Location, hookpoints: Collection[str]) -> None:
    """Compare the files of the chosen layers, and those of no layer, with the sizes in `checkpoint.json`.

    Raises:
        UserError: For the first file that is missing or has another size.
    """
    others = tuple(f"{folder_name(name)}/" for name in {*location.saes, *_promised(location.manifest)} - {*hookpoints})
    files = location.manifest.get("files")
    for name, facts in files.items() if isinstance(files, Mapping) else ():
        if name.startswith(others):
            continue
        file = location.checkpoint / name
        if not file.is_file():
            raise UserError(f"{file} is missing, although {MANIFEST} lists it: copy the checkpoint again")
        wanted = facts.get("bytes") if isinstance(facts, Mapping) else None
        if wanted is not None and file.stat().st_size != wanted:
            raise UserError(
                f"{file} has {file.stat().st_size:,} bytes, but {MANIFEST} says {wanted:,}: copy the checkpoint again"
            )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: If the file is missing or holds anything else.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as problem:
        raise UserError(f"{file} cannot be read: {problem.strerror}") from problem
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{file} is damaged: it is not JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it is not a JSON object")
    return content


def read_some_tensors(file: Path, names: Collection[str], optional: Collection[str] = ()) -> dict[str, Tensor]:
    """Read some tensors of a safetensors file; those in `optional` are left out if it lacks them.

    Raises:
        UserError: If the file is missing, truncated or corrupt, or lacks one of `names`.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as tensors:
            held = set(tensors.keys())
            lacking = sorted(set(names) - held)
            if lacking:
                raise UserError(f"{file} has no tensor {lacking[0]}: give an SAE's file")
            return {name: tensors.get_tensor(name) for name in [*names, *optional] if name in held}
    except (SafetensorError, OSError) as problem:
        raise UserError(f"{file} is truncated or damaged ({first_line(problem)})") from problem


def select(hookpoints: Collection[str], layer: str | int | None) -> list[str]:
    """Return the hookpoints that `layer` means: a whole name, or a layer number; all of them for None.

    Raises:
        UserError: If there is none.
    """
    names = list(hookpoints)
    if layer is None:
        return names
    chosen = [name for name in names if name == str(layer)]
    chosen = chosen or [name for name in names if str(layer).isdecimal() and layer_number(name) == int(layer)]
    if not chosen:
        raise UserError(f"--layer {layer}: there is no such layer; choose one of {', '.join(names)}")
    return chosen


def _lone_sae(path: Path, verify: bool) -> Location:
    for parent in list(path.parents)[:SEARCH_DEPTH]:
        if _is_checkpoint(parent):
            name = hookpoint_name(path.relative_to(parent).as_posix())
            return Location("sae", parent, _manifest(parent, verify), {name: path})
    return Location("sae", path.parent, _manifest(path.parent, verify), {hookpoint_name(path.name): path})


def _is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder has an index of ours, be it damaged: other tools may have a file of that name."""
    try:
        index = json.loads((folder / MANIFEST).read_bytes())
    except OSError:
        return False
    except (ValueError, RecursionError):
        return STEP_FOLDER.fullmatch(folder.name) is not None
    return is_ours(index)


def _newest_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint that `latest` leads to, else the one written last; None where there is neither."""
    latest = run / LATEST
    if latest.is_dir():
        # Not the link itself: it leads elsewhere as soon as a run that still trains saves again.
        target = latest.resolve()
        return run / target.name if target.parent == run.resolve() else latest
    checkpoints = numbered(run)
    return checkpoints[-1][0] if checkpoints else None


def _manifest(checkpoint: Path, verify: bool) -> dict[str, Any]:
    manifest: dict[str, Any] = {}
    if (checkpoint / MANIFEST).exists():
        try:
            manifest = read_json(checkpoint / MANIFEST)
        except UserError:
            if verify:
                raise
    if is_ours(manifest):
        if isinstance(version := manifest.get("format"), int) and version != FORMAT:
            raise UserError(
                f"{checkpoint / MANIFEST} has format {version}, and this version of saekit reads only format {FORMAT}: "
                "use the version that wrote it"
            )
        if verify and (damage := damage_of(manifest)):
            raise UserError(f"{checkpoint / MANIFEST} is damaged: {damage}; copy the checkpoint again{ALL_THE_SAME}")
        return manifest
    foreign = checkpoint / FOREIGN_FILE
    return {k: v for k, v in read_json(foreign).items() if k in ("model", "dataset")} if foreign.is_file() else {}


def _promised(manifest: Mapping[str, Any]) -> list[str]:
    hookpoints = manifest.get("hookpoints")
    return [name for name in hookpoints if isinstance(name, str)] if isinstance(hookpoints, list) else []


def _search(checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    """Find the SAE folders of a checkpoint, by their relative path.

    A folder higher up is none: what lies below it may belong to anything.
    """
    found = sae_folders_below(checkpoint)
    owners = dict.fromkeys(_owner(checkpoint, folder, marked=bool(manifest)) for folder in found.values())
    inner = [owner for owner in owners if owner != checkpoint]
    if len(inner) == 1:
        raise UserError(f"{checkpoint} is not a checkpoint, but contains one: give {inner[0]}")
    if inner:
        # One of ours before a folder that only looks like another tool's.
        example = next(filter(_is_checkpoint, inner), inner[0])
        raise UserError(f"{checkpoint} contains several checkpoints: give one of them, such as {example}")
    return found


def _owner(checkpoint: Path, folder: Path, marked: bool) -> Path:
    """Return the checkpoint that an SAE's folder belongs to: the one that was given, or one that lies in it.

    Args:
        checkpoint: The one that was given.
        folder: The SAE's, somewhere below it.
        marked: Whether a file says that it is a checkpoint.
    """
    for inner in folder.parents:
        if inner == checkpoint:
            break
        if _is_checkpoint(inner):
            return inner
    parts = folder.relative_to(checkpoint).parts
    if marked:
        return checkpoint
    for end in range(len(parts)):  # the highest folder from which its path is a hookpoint's
        if _names_hookpoint(parts[end:]):
            return checkpoint.joinpath(*parts[:end])
    return folder.parent


def _names_hookpoint(parts: Sequence[str]) -> bool:
    """Tell whether a path may be an SAE's in a checkpoint: `layers.3`, or `layers.3/seed1` as sparsify has it."""
    return len(parts) == 1 or layer_number(parts[0]) is not None or (len(parts) == 2 and parts[1].startswith("seed"))
