"""The folder of a run: whether it may be used, making it, and the options that a run in it was started with."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saekit.config import TrainConfig
from saekit.config.flat import laid_over, load_plugins, read_yaml
from saekit.errors import UserError
from saekit.runs.files import discard, flush
from saekit.runs.layout import (
    CONFIG_FILE,
    METRICS_FILE,
    contents,
    doomed_folder,
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
            raise UserError(f"--resume: {path} has no checkpoint to resume from")
        return
    if not contents(path):
        return
    if cfg.resume == "auto" and has_only_begun(path):
        return
    if not cfg.overwrite:
        raise UserError(
            f"the run folder {path} already exists: --resume continues it, --overwrite replaces it, "
            "--run-name chooses another"
        )
    if not looks_like_a_run(path):
        raise UserError(
            f"--overwrite: {path} does not look like a run (no {CONFIG_FILE} or no {METRICS_FILE} in it); "
            "nothing was deleted"
        )


def way_on(run_dir: Path) -> str:
    """Say how a run that has ended before its time can go on, in words that can be typed."""
    if has_checkpoints(run_dir):
        return f"--resume {run_dir} continues from the last checkpoint"
    return f"it has no checkpoint yet: start it again{' with --overwrite' if contents(run_dir) else ''}"


@contextmanager
def new_run_folder(cfg: TrainConfig, path: Path) -> Iterator[None]:
    """Make the folder of a run, whose lock the caller has; inside the context the run gets ready in it.

    If that fails, what it has written is deleted, and a run that was to be overwritten is back in its place.

    Raises:
        UserError: If `check_run_folder` refuses it, or the folder cannot be made.
    """
    check_run_folder(cfg, path)
    keep = goes_on(cfg, path)
    path = path.resolve()  # through a link: the run itself is replaced, not the link
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not keep:
            _set_aside(path)
        flush(path.parent)
    except OSError as error:
        with suppress(OSError):  # the same trouble; then it is put back when the lock is taken next
            put_back(path)
        raise UserError(f"the run folder {path} cannot be created ({error.strerror}): see --save-dir") from error
    try:
        yield
    except BaseException:
        if not keep:
            for each in _config_first(contents(path)):
                _delete(each)
        put_back(path)
        raise
    with suppress(OSError):  # then it is deleted when the lock is taken next
        discard(replaced_folder(path))


def _set_aside(path: Path) -> None:
    """Move what is in a run's folder out of the way. The folder itself stays, because the lock is on it."""
    replaced = replaced_folder(path)
    replaced.mkdir()
    for each in _config_first(contents(path)):
        each.rename(replaced / each.name)


def put_back(path: Path) -> None:
    """Undo what was left half done when a run was replaced: the old run is back, unless the new one has begun."""
    replaced = replaced_folder(path)
    shutil.rmtree(doomed_folder(replaced), ignore_errors=True)
    if not replaced.is_dir():
        return
    if not (path / CONFIG_FILE).exists():
        for each in reversed(_config_first(replaced.iterdir())):
            _delete(path / each.name)
            each.rename(path / each.name)
    discard(replaced)


def _config_first(entries: Iterable[Path]) -> list[Path]:
    """Sort what is in a run's folder; the configuration goes first and comes back last.

    So the folder has one exactly if all of the old run, or something of the new one, is in it.
    """
    return sorted(entries, key=lambda each: (each.name != CONFIG_FILE, each.name))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def all_options(given: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    """Collect a run's options: those given, over those of a YAML file, over those of the run that `resume` names.

    Args:
        given: Options by name, without those that were not given.
        config: The YAML file.

    Raises:
        UserError: If the file, a plug-in or the run cannot be read, or if an option contradicts `resume`.
    """
    values = laid_over({} if config is None else read_yaml(config), given)
    load_plugins(values)
    resume = values.get("resume")
    if isinstance(resume, (str, Path)) and str(resume) not in ("auto", "latest"):
        values = laid_over(_options_of_run(Path(resume), given), values)
    return values


def _options_of_run(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read the options of the run that `resume` names."""
    run = run_of(path)
    if not has_checkpoints(run):
        hint = "" if len(path.parts) > 1 else " (to resume the run of that name, write --resume latest)"
        raise UserError(f"--resume {path}: it has no checkpoint to resume from{hint}")
    for name in ("save_dir", "run_name"):
        if name in given:
            option = f"--{name.replace('_', '-')} {given[name]}"
            raise UserError(
                f"{option} contradicts --resume {path}, which already says where the run is: give only one of them"
            )
    kept = read_yaml(run / CONFIG_FILE)
    if "placement" in given:  # what belongs to another one is left out
        kept = {name: value for name, value in kept.items() if name not in ("layer_map", "shard_lm")}
    return kept
