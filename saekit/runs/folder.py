"""The folder of a run: whether it may be used, and making it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saekit.config import TrainConfig
from saekit.errors import UserError
from saekit.runs.files import flush
from saekit.runs.layout import (
    CONFIG_FILE,
    METRICS_FILE,
    has_checkpoints,
    has_only_begun,
    looks_like_a_run,
    replaced_folder,
    run_of,
)


def run_folder(cfg: TrainConfig, default_name: str) -> Path:
    """Return where a run lives: with the checkpoint that it is to go on from, or in `save_dir`."""
    if isinstance(cfg.resume, Path):
        return run_of(cfg.resume)
    return cfg.save_dir / (cfg.run_name or default_name)


def goes_on(cfg: TrainConfig, path: Path) -> bool:
    """Tell whether the run in folder `path` continues, rather than starts."""
    return has_checkpoints(path) if cfg.resume == "auto" else bool(cfg.resume)


def check_run_folder(cfg: TrainConfig, path: Path) -> None:
    """Refuse a run folder that exists without permission, or that does not exist although it should.

    Raises:
        UserError: Naming the folder and what to do.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"the run folder {path} is a file: see --save-dir and --run-name")
    if goes_on(cfg, path):
        if not has_checkpoints(path):
            raise UserError(f"--resume: there is no checkpoint to go on from in {path}")
        return
    if not path.exists() or not any(path.iterdir()):
        return
    if cfg.resume == "auto" and has_only_begun(path):
        return
    if not cfg.overwrite:
        raise UserError(
            f"the run folder {path} exists already: --resume goes on with it, --overwrite replaces it, "
            "--run-name chooses another"
        )
    if not looks_like_a_run(path):
        raise UserError(
            f"--overwrite: {path} does not look like a run (no {CONFIG_FILE} or no {METRICS_FILE} in it); "
            "nothing was deleted"
        )


@contextmanager
def new_run_folder(cfg: TrainConfig, path: Path) -> Iterator[None]:
    """Make the folder of a run; inside the context the run gets ready in it.

    If that fails, the folder is taken away again, and a run that was to be overwritten is back in its place.

    Raises:
        UserError: If `check_run_folder` refuses it, or the folder cannot be made.
    """
    check_run_folder(cfg, path)
    keep = goes_on(cfg, path)
    path = path.resolve()  # through a link: the run itself is replaced, not the link
    replaced = replaced_folder(path)
    try:
        shutil.rmtree(replaced, ignore_errors=True)
        if not keep and path.exists():
            path.rename(replaced)
        path.mkdir(parents=True, exist_ok=True)
        flush(path.parent)
    except OSError as error:
        raise UserError(f"the run folder {path} cannot be made ({error.strerror}): see --save-dir") from error
    try:
        yield
    except BaseException:
        if not keep:
            shutil.rmtree(path)
        if replaced.exists():
            replaced.rename(path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
