"""The layout of a run's folder. Every name of a file or folder of a run is spelled here, and nowhere else.

RUN/config.yaml                      the configuration, with every default; as `run.yaml` it starts the same run again
RUN/metrics.jsonl                    one line per report, and per evaluation
RUN/trackers/                        what trackers of `--log-with` write that keep files
RUN/latest -> step_00000200          RUN/best -> step_00000150 (with --save-best)
RUN/.lock                            the process that writes in the folder (`lock`), as long as it does
RUN/.replaced/                       the run that `--overwrite` replaces, until the new one is ready
RUN/step_00000200/checkpoint.json    step, tokens, place in the data, schedule, seeds, versions, configuration, size
                                     and checksum of every file, and a checksum of all that
RUN/step_00000200/eval.json          what `saekit eval` found
RUN/step_00000200/report/            what `saekit report --serve` reads
RUN/step_00000200/layers.0/          one folder per hookpoint (`layers.0.mlp@in` for `layers.0.mlp:in`):
    cfg.json, sae.safetensors        the SAE, in sparsify's format; `saekit.sae.storage` has these names
    saekit.json                      what it was trained on
    state.safetensors                counters, calibration, optimizer state

A checkpoint is written to `.step_00000200.partial`. Its index, `checkpoint.json`, comes last, when everything that it
names is on the disk: a folder with an index is whole, whatever it is called, and `recovery` puts it in place if the
writer died before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

RUN_FILE = "run.yaml"
"""Where `saekit config` writes what it was told, unless it is told another name."""
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
INDEX_FILE = "checkpoint.json"
"""Its presence makes a folder a checkpoint."""
STATE_FILE = "state.safetensors"
ABOUT_FILE = "saekit.json"
EVAL_FILE = "eval.json"
EVAL_FORMAT = 2
"""Of `eval.json`. In format 1, intervals were the normal distribution's, and few sequences gave no warning."""
REPORT_FOLDER = "report"
FOREIGN_FILE = "config.json"
"""Where sparsify says what it trained on."""
FORMAT = 3
"""Of `checkpoint.json` and what it speaks of."""
LATEST, BEST = "latest", "best"
"""Links to a run's checkpoints."""
STEP_FOLDER = re.compile(r"step_(\d{8,})")
LOCK_FILE = ".lock"
REPLACED = ".replaced"
PARTIAL, DELETED = ".partial", ".deleted"
"""Endings of folders that are being written or deleted; their names begin with a dot."""


def checkpoint_folders(run_dir: Path, step: int) -> tuple[Path, Path]:
    """Return a checkpoint's folder, and the one in which it is written until it is whole."""
    final = run_dir / f"step_{step:08d}"
    return final, run_dir / f".{final.name}{PARTIAL}"


def final_folder(partial: Path) -> Path:
    """Return the folder that a checkpoint gets once it is whole, given the one in which it is written."""
    return partial.with_name(partial.name.removeprefix(".").removesuffix(PARTIAL))


def doomed_folder(folder: Path) -> Path:
    """Return the name under which a checkpoint's folder, or an unfinished one, is deleted."""
    return folder.with_name(f".{folder.name.strip('.').split('.')[0]}{DELETED}")


def replaced_folder(run_dir: Path) -> Path:
    """Return where the content of a run's folder lies while another run is about to replace it."""
    return run_dir / REPLACED


def contents(run_dir: Path) -> list[Path]:
    """List what is in a run's folder; not the lock, nor what is about to be replaced. Empty if there is no folder."""
    if not run_dir.is_dir():
        return []
    return [each for each in sorted(run_dir.iterdir()) if not each.name.startswith((LOCK_FILE, REPLACED))]


def unfinished_locks(run_dir: Path) -> Iterator[Path]:
    """Yield what processes that were killed while they took the lock have left."""
    yield from run_dir.glob(f"{LOCK_FILE}.*")


def step_folders(run_dir: Path) -> list[Path]:
    """List a run's checkpoints, whole or damaged, by step; not what a user has put next to them."""
    found = [(int(name[1]), path) for path in run_dir.glob("step_*") if (name := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def partial_folders(run_dir: Path) -> list[Path]:
    """List the checkpoints of a run that never got their place."""
    return sorted(run_dir.glob(f".step_*{PARTIAL}"))


def remains(run_dir: Path) -> Iterator[Path]:
    """Yield what saves and deletions leave behind when they are killed."""
    yield from partial_folders(run_dir)
    yield from run_dir.glob(f".step_*{DELETED}")


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path is meant as one checkpoint, be it damaged or missing. `RUN/latest` stands for the run."""
    return path.name != LATEST and STEP_FOLDER.fullmatch(path.resolve().name) is not None


def run_of(path: Path) -> Path:
    """Return the run's folder, given it or one of its checkpoints, damaged ones and links included."""
    if path.name in (LATEST, BEST):
        return path.parent
    resolved = path.resolve()
    return resolved.parent if STEP_FOLDER.fullmatch(resolved.name) else path


def has_checkpoints(run_dir: Path) -> bool:
    """Tell whether a run has saved anything, be it damaged by now."""
    return any(run_dir.glob("step_*")) or any((partial / INDEX_FILE).exists() for partial in partial_folders(run_dir))


def has_only_begun(run_dir: Path) -> bool:
    """Tell whether a run was killed before its first checkpoint, and nothing else lies in its folder."""
    own = {f"{name}{unfinished}" for name in (CONFIG_FILE, METRICS_FILE) for unfinished in ("", ".tmp")}
    return all(file.name in own or file.match(f".step_*{PARTIAL}") for file in contents(run_dir))


def looks_like_a_run(folder: Path) -> bool:
    """Tell whether a folder holds what every run has from its first moment on."""
    return (folder / CONFIG_FILE).is_file() and (folder / METRICS_FILE).is_file()
