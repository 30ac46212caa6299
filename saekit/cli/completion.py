"""What a shell completes an option's value to, found without heavy libraries; nothing where something is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from saekit.config.ranks import placement_names
from saekit.registry import SELECTIONS, SOURCES

SHORT_NAMES = ("resid", "resid_pre", "mlp", "attn")
"""What `--hookpoints` takes instead of paths."""
HEADER_BYTES = 8
"""A safetensors file begins with the length of its header, a little-endian number of this many bytes."""
LARGEST_HEADER = 100_000_000
"""Bytes; safetensors refuses a longer one."""
Completer = Callable[[typer.Context, str], list[str]]


def _completer(find: Callable[[typer.Context, str], Iterable[str]]) -> Completer:
    """Keep what begins as typed. A file that cannot be read, or is not what it should be, adds nothing."""

    @wraps(find)
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        found = []
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            for each in find(ctx, incomplete):
                if each.startswith(incomplete):
                    found.append(each)  # what was found before an error is kept
        return found

    return complete


@_completer
def hookpoints(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Short names, and the paths of the modules of MODEL if that is a local folder; after a comma, one more."""
    before, comma, typed = incomplete.rpartition(",")
    yield from (f"{before}{comma}{name}" for name in SHORT_NAMES)
    yield from (f"{before}{comma}{name}" for name in _paths(_model(ctx), typed))


@_completer
def launch_names(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """The launch files that come with saekit."""
    from saekit.cli.launch import launch_files

    return [name.replace("_", "-") for name in launch_files()]


@_completer
def run_names(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """The runs in --save-dir."""
    return [run.name for run in _runs(_save_dir(ctx))]


@_completer
def run_paths(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """The folders of the runs in --save-dir."""
    return map(str, _runs(_save_dir(ctx)))


@_completer
def to_resume(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """What `--resume` takes."""
    yield "auto"
    yield from map(str, _runs(_save_dir(ctx)))


@_completer
def placements(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Built-in placements and those of installed packages."""
    return placement_names()


@_completer
def activations(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Built-in selections and those of installed packages."""
    return SELECTIONS.names()


@_completer
def sources(ctx: typer.Context, incomplete: str) -> Iterable[str]:
    """Built-in sources and those of installed packages."""
    return SOURCES.names()


VALUES: dict[str, Completer] = {
    **dict.fromkeys(("hookpoints", "reads", "writes", "crosscode"), hookpoints),
    "activation": activations,
    "source": sources,
    "placement": placements,
    "run_name": run_names,
    "resume": to_resume,
    "finetune": run_paths,
}
"""By option of the configuration. Typer completes those with fixed values by itself."""


def _model(ctx: typer.Context) -> Path:
    """Return MODEL, which the parser leaves among the rest if the last option has no value yet."""
    return Path(ctx.params.get("model") or ctx.args[0])


def _save_dir(ctx: typer.Context) -> Path:
    from saekit.config import TrainConfig

    return Path(ctx.params.get("save_dir") or TrainConfig().save_dir)


def _runs(save_dir: Path) -> list[Path]:
    from saekit.runs.layout import looks_like_a_run

    return sorted(folder for folder in save_dir.iterdir() if looks_like_a_run(folder))


def _paths(model: Path, typed: str) -> list[str]:
    """Return the paths of a model's modules that hold weights, and of what they are in, relative to the base model.

    They come from the names of the weights, since to build the model would take seconds. The number of a block is `*`
    unless a number is typed.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tensors = _tensors(model)
    bare = all(re.fullmatch(r".*(?<!LMHead)Model", name) for name in config.get("architectures") or [""])
    number = re.search(r"\.(\d+)(\.|$)", typed)
    found: set[str] = set()
    for name in tensors:
        parts = name.split(".")[:-1]
        place = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
        if not place:  # an embedding, for example
            continue
        own = parts[place] if number else "*"
        # The base model is an attribute of the model with a head, unless the file holds the base model by itself.
        start = 0 if bare or place == 1 else 1
        stack = [*parts[start:place], own]
        found |= {".".join([*stack, *parts[place + 1 : end]]) for end in range(place + 1, len(parts) + 1)}
    return sorted(found, key=lambda path: (path.count("."), path))


def _tensors(model: Path) -> Iterable[str]:
    """Return the names of a model's weights, from an index or the header of a safetensors file."""
    index = model / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return names
    with (model / "model.safetensors").open("rb") as file:
        length = int.from_bytes(file.read(HEADER_BYTES), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"{model} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    return header.keys() - {"__metadata__"}
