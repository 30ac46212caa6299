"""Check a language model's folder for missing or broken files. Reads only names, sizes and headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from saekit.errors import UserError

CONFIG = "config.json"
SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
POINTER = b"version https://git-lfs"
"""The first bytes of a Git LFS pointer, the small file that git stores in place of a large one."""
SHOWN = 6
"""The most files that a message lists."""


def check_model_folder(name: str, folder: Path, *, weights: bool) -> None:
    """Check that a folder holds a language model as transformers saves it.

    Args:
        name: The folder as the user wrote it.
        folder: The existing folder that the name means.
        weights: Whether to check the weights too. A plan needs only the config.

    Raises:
        UserError: If a file is missing, truncated or damaged, or is a Git LFS pointer.
    """
    try:
        problem = _config_problem(folder) or (_weights_problem(folder) if weights else None)
    except OSError as error:
        problem = f"the folder cannot be read ({error.strerror})"
    if problem is not None:
        raise UserError(f"model {name!r} could not be loaded: {problem}")


def safetensors_problem(file: Path) -> str | None:
    """Return what is wrong with a safetensors file, judging by its size and header; None if nothing is."""
    if (problem := _file_problem(file)) is not None:
        return problem
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(9)
        length = int.from_bytes(start[:8], "little")
        if size > 8 and start[8:] != b"{":
            return f"{file.name} is damaged: it does not start like a safetensors file"
        if length + 8 > size:
            return f"{file.name} is truncated: it ends after {size:,} bytes, inside its header"
        opened.seek(8)
        header = opened.read(length)
    try:
        spans = [entry["data_offsets"] for key, entry in json.loads(header).items() if key != "__metadata__"]
        whole = 8 + length + max((int(end) for _, end in spans), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{file.name} is damaged: its header cannot be read"
    if size < whole:
        return f"{file.name} is truncated: it has {size:,} of {whole:,} bytes"
    if size > whole:
        return f"{file.name} is damaged: it has {size:,} bytes, but its header says {whole:,}"
    return None


def _config_problem(folder: Path) -> str | None:
    file = folder / CONFIG
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            return "the folder holds an adapter (adapter_config.json): merge it into its model, and pass the result"
        deeper = sorted((*folder.glob(f"*/{CONFIG}"), *folder.glob(f"snapshots/*/{CONFIG}")))
        hint = f"; did you mean {deeper[0].parent}?" if deeper else f"; {_content(folder)}"
        return f"there is no {CONFIG} in the folder{hint}"
    config, problem = _read_json(file)
    if problem is None and not isinstance(config, dict):
        return f"{CONFIG} is damaged: it holds a {type(config).__name__}, not a mapping"
    return problem


def _weights_problem(folder: Path) -> str | None:
    """Check the file that transformers would read: the first that exists, in its order of search."""
    if isinstance(named := _read_json(folder / CONFIG)[0].get("transformers_weights"), str):
        files = [named]
    else:
        files = [SAFETENSORS, f"{SAFETENSORS}.index.json", PICKLED, f"{PICKLED}.index.json"]
    for name in files:
        if (file := folder / name).exists():
            return _index_problem(file) if name.endswith(".index.json") else _whole(file)
    return f"there are no weights in the folder ({' or '.join(files[::2])}); {_content(folder)}"


def _index_problem(file: Path) -> str | None:
    """Check the files that an index names."""
    index, problem = _read_json(file)
    if problem is not None:
        return problem
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not all(isinstance(each, str) for each in named.values()):
        return f"{file.name} is damaged: it has no weight_map"
    for part in sorted(set(named.values())):
        if not (file.parent / part).exists():
            return f"{part} is missing, but {file.name} names it"
        if (problem := _whole(file.parent / part)) is not None:
            return problem
    return None


def _whole(file: Path) -> str | None:
    return safetensors_problem(file) if file.suffix == ".safetensors" else _file_problem(file)


def _file_problem(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            start = opened.read(len(POINTER))
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    if not start:
        return f"{file.name} is empty"
    if start == POINTER:
        return f"{file.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in {file.parent}"
    return None


def _read_json(file: Path) -> tuple[Any, str | None]:
    if (problem := _file_problem(file)) is not None:
        return None, problem
    try:
        return json.loads(file.read_text(encoding="utf-8")), None
    except ValueError as error:
        return None, f"{file.name} is damaged ({error})"


def _content(folder: Path) -> str:
    """List what a folder contains, for a message."""
    names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    if not names:
        return "it is empty"
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"it has {', '.join(names[:SHOWN])}{more}"
