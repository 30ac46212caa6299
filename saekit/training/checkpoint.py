"""Checkpoints: whole tensors per layer, in files any reader of the field knows, put in place by one rename.

RUN/config.yaml, metrics.jsonl
RUN/latest -> step_00000200          RUN/best -> step_00000150 (with --save-best)
RUN/step_00000200/checkpoint.json    step, tokens, versions, configuration, size and SHA-256 of every file
RUN/step_00000200/layers.0/          one folder per hookpoint:
    cfg.json, sae.safetensors        the SAE, in sparsify's format
    saekit.json                      what it was trained on
    state.safetensors                counters, calibration, optimiser state
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit.errors import UserError
from saekit.sae import Sae
from saekit.sae.storage import save_to_disk

FORMAT = 1
INDEX_FILE = "checkpoint.json"
STATE_FILE = "state.safetensors"
ABOUT_FILE = "saekit.json"


@dataclass(frozen=True)
class LayerRecord:
    """What is kept of one layer."""

    sae: Sae
    """For its sizes."""
    weights: dict[str, Tensor]
    """Whole tensors by parameter name."""
    state: dict[str, Tensor]
    """Counters, calibration and optimiser state."""
    about: dict[str, Any]
    """The content of `saekit.json`."""


Fingerprints = dict[str, dict[str, Any]]
"""Size and SHA-256 of files, by their path inside the checkpoint."""


def checkpoint_folders(run_dir: Path, step: int) -> tuple[Path, Path]:
    """A checkpoint's folder, and the one in which it is written until it is whole."""
    final = run_dir / f"step_{step:08d}"
    return final, run_dir / f".{final.name}.partial"


def begin_checkpoint(run_dir: Path, step: int) -> None:
    """Make the folder that layers are written to; what an interrupted save left in it goes."""
    partial = checkpoint_folders(run_dir, step)[1]
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def write_layers(run_dir: Path, step: int, layers: Iterable[tuple[str, LayerRecord]]) -> Fingerprints:
    """Write layers' files, flush them to the disk, and say what they are.

    Layers are taken one at a time, so that no more than one layer's copies exist at once. Several ranks may write
    different layers of one checkpoint at the same time.
    """
    partial = checkpoint_folders(run_dir, step)[1]
    fingerprints = {}
    for hookpoint, record in layers:
        folder = partial / hookpoint
        save_to_disk(record.sae, folder, record.weights)
        save_file(_apart(record.state), folder / STATE_FILE)
        (folder / ABOUT_FILE).write_text(json.dumps(record.about, indent=2) + "\n", encoding="utf-8")
        for file in sorted(folder.iterdir()):
            _flush(file)
            name = file.relative_to(partial).as_posix()
            fingerprints[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        _flush(folder)
    return fingerprints


def finish_checkpoint(run_dir: Path, step: int, fingerprints: Fingerprints, index: Mapping[str, Any]) -> Path:
    """Write the index, put the checkpoint in place, make `latest` point to it, and return its folder.

    A reader sees the folder whole or not at all: it is renamed when everything in it is on the disk.
    """
    final, partial = checkpoint_folders(run_dir, step)
    content = {"format": FORMAT, "step": step, **index, "files": fingerprints}
    (partial / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in (partial / INDEX_FILE, partial):
        _flush(path)
    if final.exists():  # a resumed run that passes the same step again
        shutil.rmtree(final)
    os.replace(partial, final)
    _flush(run_dir)
    point(run_dir / "latest", final)
    return final


def point(link: Path, folder: Path) -> None:
    """Make a link to a sibling folder, replacing an old one in a single step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)


def prune(run_dir: Path, keep_last: int, newest: Path) -> None:
    """Delete checkpoints before `newest`, the one just written, but for the last `keep_last`, it included.

    What `latest` and `best` point to stays. So does what has a higher step (the user went back to an earlier one):
    it is replaced when the run passes that step again. Remains of saves that were killed go.
    """
    linked = {(run_dir / link).resolve() for link in ("latest", "best") if (run_dir / link).is_symlink()}
    earlier = [folder for folder in sorted(run_dir.glob("step_*")) if folder.name <= newest.name]
    for folder in earlier[:-keep_last]:
        if folder.resolve() not in linked:
            shutil.rmtree(folder)
    for partial in run_dir.glob(".step_*.partial"):
        shutil.rmtree(partial)


def read_index(checkpoint: Path) -> dict[str, Any]:
    """The content of `checkpoint.json`, after checking that every file it names is there and whole.

    Raises:
        UserError: If the index or a file is missing or damaged; the message names it.
    """
    try:
        index = json.loads((checkpoint / INDEX_FILE).read_text(encoding="utf-8"))
        files = dict(index["files"])
    except OSError as error:
        raise UserError(f"no checkpoint in {checkpoint}: {INDEX_FILE} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{checkpoint / INDEX_FILE} is damaged: use another checkpoint") from None
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"checkpoint {checkpoint} is incomplete: {name} is missing; use another checkpoint")
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise UserError(f"checkpoint {checkpoint} is damaged: {name} has changed; use another checkpoint")
    return index


def read_state(folder: Path) -> dict[str, Tensor]:
    """A layer's counters, calibration and optimiser state, on the CPU."""
    try:
        return load_file(folder / STATE_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / STATE_FILE} cannot be read ({error}): use another checkpoint") from None


@contextmanager
def new_run_folder(path: Path, *, overwrite: bool, resume: bool) -> Iterator[None]:
    """Make the folder of a run; inside the context the run gets ready in it.

    If that fails, the folder is taken away again, and a run that was to be overwritten is back in its place.

    Raises:
        UserError: If `check_run_folder` refuses it, or the folder cannot be made.
    """
    check_run_folder(path, overwrite=overwrite, resume=resume)
    path = path.resolve()  # through a link: the run itself is replaced, not the link
    replaced = path.with_name(f".{path.name}.replaced")
    try:
        shutil.rmtree(replaced, ignore_errors=True)
        if overwrite and path.exists():
            path.rename(replaced)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {path} cannot be made ({error.strerror}): see --save-dir") from error
    try:
        yield
    except BaseException:
        if not resume:
            shutil.rmtree(path)
        if replaced.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def check_run_folder(path: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a run folder that exists without permission, or that does not exist although it should."""
    if path.exists() and not path.is_dir():
        raise UserError(f"the run folder {path} is a file: see --save-dir and --run-name")
    if resume:
        if not (path / "latest" / INDEX_FILE).is_file():
            raise UserError(f"--resume: there is no checkpoint to go on from in {path}")
        return
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"the run folder {path} exists already: --resume goes on with it, --overwrite replaces it, "
            "--run-name chooses another"
        )
    if not (path / "config.yaml").is_file() or not (path / "metrics.jsonl").is_file():
        raise UserError(
            f"--overwrite: {path} does not look like a run (no config.yaml or no metrics.jsonl in it); "
            "nothing was deleted"
        )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own (8-bit Adam shares its tables between parameters)."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        own[name] = flat.clone() if flat.data_ptr() in seen else flat
        seen.add(flat.data_ptr())
    return own


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
