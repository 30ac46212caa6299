"""What lies where in a run's folder. `saekit.runs.checkpoint` draws the picture."""

from __future__ import annotations

import re
from pathlib import Path

INDEX_FILE = "checkpoint.json"
"""Its presence makes a folder a checkpoint."""
STATE_FILE = "state.safetensors"
ABOUT_FILE = "saekit.json"
EVAL_FILE = "eval.json"
"""Beside the layers' folders: what `saekit eval` found."""
EVAL_FORMAT = 1
"""Of that file."""
FORMAT = 2
"""Of `checkpoint.json` and what it speaks of."""
STEP_FOLDER = re.compile(r"step_\d{8,}")


def checkpoint_folders(run_dir: Path, step: int) -> tuple[Path, Path]:
    """A checkpoint's folder, and the one in which it is written until it is whole."""
    final = run_dir / f"step_{step:08d}"
    return final, run_dir / f".{final.name}.partial"


def is_checkpoint(path: Path) -> bool:
    """Whether a path is meant as one checkpoint, be it damaged or missing. The link `RUN/latest` stands for the run."""
    return path.name != "latest" and STEP_FOLDER.fullmatch(path.resolve().name) is not None


def run_of(path: Path) -> Path:
    """The run's folder, given it or one of its checkpoints, damaged ones and links included."""
    if path.name in ("latest", "best"):
        return path.parent
    resolved = path.resolve()
    return resolved.parent if STEP_FOLDER.fullmatch(resolved.name) else path


def has_checkpoints(run_dir: Path) -> bool:
    """Whether a run has saved anything, be it damaged by now."""
    return any(run_dir.glob("step_*")) or any(run_dir.glob(f".step_*.partial/{INDEX_FILE}"))
