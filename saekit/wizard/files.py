"""The files that start a run: read as defaults, shown, written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saekit.config import RunConfig
from saekit.config.flat import SECRETS
from saekit.errors import UserError
from saekit.placement.choose import launched_as

FIRST = (
    "model",
    "dataset",
    "split",
    "data_args",
    "text_column",
    "layers",
    "expansion_factor",
    "num_latents",
    "k",
    "ctx_len",
    "max_tokens",
    "batch_size",
    "save_dir",
    "run_name",
)
"""The order in `run.yaml`, which is that of the questions; what was not asked follows."""


@dataclass(frozen=True)
class Targets:
    """Where the files go."""

    run: Path
    launch: Path
    templates: Mapping[str, Path]
    """The launch files that come with saekit, by name: `ddp`, `zero3_cpu`, ..."""


@dataclass(frozen=True)
class Launch:
    """What a launch file says, as far as the wizard has written it."""

    processes: int | None = None
    placement: str = ""
    on_gpu: bool = False


def run_text(values: Mapping[str, Any], cfg: RunConfig) -> str:
    """`run.yaml`: what was answered, typed or kept, as plain values; secrets are left out."""
    plain = cfg.to_flat()
    plain = {name: plain[name] for name in (*FIRST, *plain) if name in values and name in plain}
    if isinstance(values.get("layers"), str):
        plain["layers"] = values["layers"]  # 0-31:2 reads better than sixteen numbers
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=1000)


def secrets_in(values: Mapping[str, Any]) -> list[str]:
    """Options that will not be written."""
    return sorted(SECRETS & set(values))


def launch_text(template: Path, processes: int) -> str:
    """The accelerate launch file: one that comes with saekit, for so many processes."""
    said = yaml.safe_load(template.read_text(encoding="utf-8"))
    said["num_processes"] = processes
    return yaml.safe_dump(said, sort_keys=False)


def template_for(targets: Targets, placement: str, *, on_gpu: bool) -> Path:
    """The launch file of a placement that comes with saekit."""
    return targets.templates[placement.replace("-", "_") + ("" if on_gpu else "_cpu")]


def read_launch(path: Path) -> Launch:
    """What an earlier launch file says; nothing where there is none, or it is somebody else's."""
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        processes = int(said["num_processes"])
        placement = launched_as(said)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return Launch()
    return Launch(processes, placement or "", on_gpu=said.get("gpu_ids") != "-1,-1")


def write(files: Mapping[Path, str]) -> None:
    """Write all of them or none: each is whole beside its place before the first is put there.

    Raises:
        UserError: If one cannot be written.
    """
    ready = {path: path.with_name(f".{path.name}.partial") for path in files}
    try:
        for path, partial in ready.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(files[path], encoding="utf-8")
        for path, partial in ready.items():
            os.replace(partial, path)
    except OSError as error:
        for partial in ready.values():
            with suppress(OSError):  # it was not written, or cannot be taken away either
                partial.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
