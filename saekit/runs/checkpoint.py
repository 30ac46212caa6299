"""Write checkpoints: whole tensors per layer, in files any reader of the field knows, put in place by one rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from saekit.runs.files import discard, fingerprint, flush, point, write_at_once
from saekit.runs.index import sealed
from saekit.runs.layout import (
    ABOUT_FILE,
    BEST,
    FORMAT,
    INDEX_FILE,
    LATEST,
    METRICS_FILE,
    STATE_FILE,
    checkpoint_folders,
    final_folder,
    remains,
    step_folders,
)
from saekit.sae import Sae
from saekit.sae.storage import folder_name


@dataclass(frozen=True)
class LayerRecord:
    """The content of one unit's folder."""

    sae: Sae
    """For its sizes."""
    weights: dict[str, Tensor]
    """Whole tensors by parameter name."""
    state: dict[str, Tensor]
    """Counters, calibration and optimizer state."""
    about: dict[str, Any]
    """The content of `saekit.json`."""


class NotHere(OSError):  # noqa: N818  # it becomes a SaveError
    """Ranks do not see the same disk."""


Fingerprints = dict[str, dict[str, Any]]
"""Size and checksum of files, by their path inside the checkpoint."""


def begin_checkpoint(run_dir: Path, step: int) -> None:
    """Make the folder that layers are written to; what an interrupted save left in it goes."""
    partial = checkpoint_folders(run_dir, step)[1]
    discard(partial)
    partial.mkdir()  # without parents: a run's folder that has vanished (a lost mount) is an error


def write_layers(run_dir: Path, step: int, layers: Iterable[tuple[str, LayerRecord]]) -> Fingerprints:
    """Write layers' files, flush them to the disk, and say what they are.

    Layers are taken one at a time, so that at most one layer's copies exist at once; the disk takes in a layer's
    files while the next layer is made. Several ranks may write different layers of one checkpoint at the same time.

    Raises:
        OSError: If a file cannot be written. All layers are taken nevertheless: making one is collective.
    """
    partial = checkpoint_folders(run_dir, step)[1]
    fingerprints: Fingerprints = {}
    problem: Exception | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="flush") as disk:
        flushes: list[Future[None]] = []
        for hookpoint, record in layers:
            try:
                if problem is None:
                    folder = partial / folder_name(hookpoint)
                    files = _write_layer(folder, record)
                    flushes += [disk.submit(flush, path) for path in (*files, folder)]
                    fingerprints.update({file.relative_to(partial).as_posix(): fingerprint(file) for file in files})
            except (OSError, SafetensorError) as error:
                problem = error
            del record  # before the next layer is made
        for done in flushes:
            problem = done.exception() or problem  # type: ignore[assignment]  # what it can raise is an OSError
    if problem is not None:
        raise problem if isinstance(problem, OSError) else OSError(f"{partial}: {problem}")
    return fingerprints


def _write_layer(folder: Path, record: LayerRecord) -> list[Path]:
    record.sae.save_to_disk(folder, record.weights)
    save_file(_apart(record.state), folder / STATE_FILE)
    (folder / ABOUT_FILE).write_text(json.dumps(record.about, indent=2) + "\n", encoding="utf-8")
    return sorted(folder.iterdir())


def finish_checkpoint(run_dir: Path, step: int, fingerprints: Fingerprints, index: Mapping[str, Any]) -> Path:
    """Write the index, put the checkpoint in place, make `latest` point to it, and return its folder.

    Raises:
        OSError: If that cannot be done; `NotHere` if other ranks have written their layers somewhere else.
    """
    partial = checkpoint_folders(run_dir, step)[1]
    for name, each in fingerprints.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != each["bytes"]:
            raise NotHere(f"another rank has written {name}, and it is not here: all machines must share --save-dir")
    if (metrics := run_dir / METRICS_FILE).exists():  # what the checkpoint's steps reported lasts as long as it does
        flush(metrics)
    serial = 1 + max((each for _, each in numbered(run_dir)), default=0)
    content = sealed({"format": FORMAT, "serial": serial, "step": step, **index, "files": fingerprints})
    flush(partial)
    write_at_once(partial / INDEX_FILE, json.dumps(content, indent=2) + "\n")
    return put_in_place(partial)


def put_in_place(partial: Path) -> Path:
    """Give a checkpoint that is whole its name, make `latest` point to it, and return its folder."""
    run_dir = partial.parent
    final = final_folder(partial)
    # There is one if the run went back to an earlier checkpoint, and passes this step again. A process that dies in
    # between leaves a whole partial folder, which `recovery` finds.
    discard(final)
    os.replace(partial, final)
    flush(run_dir)
    point(run_dir / LATEST, final)
    return final


def numbered(run_dir: Path) -> list[tuple[Path, int]]:
    """Return the run's checkpoints, whole or damaged, with their serial numbers; the last is the one written last.

    The number, not the step, says what is newest: a run can go back to an earlier step. What has no index that can be
    read comes first.
    """
    found = [(folder, _serial(folder)) for folder in step_folders(run_dir)]
    return sorted(found, key=lambda each: each[1])


def _serial(folder: Path) -> int:
    try:
        return int(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["serial"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def prune(run_dir: Path, keep_last: int) -> None:
    """Delete all but the `keep_last` checkpoints that were written last, and what interrupted saves left.

    What `best` points to stays. So does what has a higher step than the newest (the user went back to an earlier one):
    it is replaced when the run passes that step again.
    """
    best = (run_dir / BEST).resolve()
    checkpoints = [folder for folder, _ in numbered(run_dir)]
    newest = checkpoints[-1]
    earlier = [folder for folder in checkpoints if folder.name <= newest.name]
    for folder in earlier[:-keep_last]:
        if folder.resolve() != best:
            discard(folder)
    for each in list(remains(run_dir)):
        discard(each)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, each with memory of its own (8-bit Adam shares its tables between parameters)."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        own[name] = flat.clone() if flat.data_ptr() in seen else flat
        seen.add(flat.data_ptr())
    return own
