"""A report as a folder, from which `saekit report --serve` reads what is looked at.

    index.json      what the other files hold; written last
    page.html       the page without the data of its latents
    plotly.js       the charts' library
    text.bin        the text that features are looked at in: numbers of the page's vocabulary, `[S, T]`
    layer-0.bin     the arrays of the first layer, one after another, each row after row, little-endian

So what the page shows of one latent is a few rows, whose places in the file follow from the latent's own.
This module imports no numerical library: a server needs none.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saekit.errors import UserError
from saekit.runs.layout import EVAL_FILE, INDEX_FILE, LATEST, REPORT_FOLDER

FORMAT = 1
INDEX, PAGE, PLOTLY, TEXT = "index.json", "page.html", "plotly.js", "text.bin"
SIZES = {"uint8": 1, "uint16": 2, "int32": 4, "float32": 4}
"""Bytes of an element, by its type."""
TEXT_COLUMN = "text"
"""The only column of `text.bin`."""
ONCE = frozenset({"latents", "silent"})
"""Columns that no latent has a row of for itself: the latents' own numbers, and those that never fired."""


class Column(NamedTuple):
    """An array in a file."""

    name: str
    type: str
    """One of `SIZES`."""
    rows: int
    width: int
    """Elements per row."""
    offset: int
    """Bytes before it."""

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row."""
        return SIZES[self.type] * self.width

    @property
    def bytes(self) -> int:
        """Return the bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Index:
    """The content of `index.json`."""

    build: str
    """A word that only this folder has: pages of another one get no answer."""
    identity: str
    """Of the checkpoint and its evaluation (`identity`)."""
    asked: dict[str, Any]
    """The options that it was made with."""
    text: Column
    layers: tuple[tuple[Column, ...], ...]

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(
            {
                "saekit_report": FORMAT,
                "build": self.build,
                "identity": self.identity,
                "asked": self.asked,
                "text": self.text._asdict(),
                "layers": [[column._asdict() for column in layer] for layer in self.layers],
            }
        )


def layer_file(number: int) -> str:
    """Return the name of a layer's file."""
    return f"layer-{number}.bin"


def default_folder(path: Path) -> Path:
    """Return where the report of a run (its newest checkpoint), a checkpoint or an SAE's folder is kept."""
    return _checkpoint(path) / REPORT_FOLDER


def _checkpoint(path: Path) -> Path:
    newest = path / LATEST
    return newest.resolve() if not (path / INDEX_FILE).exists() and newest.is_dir() else path


def is_report(folder: Path) -> bool:
    """Tell whether a folder is a report, whole or not."""
    return (folder / INDEX).is_file() and (folder / PAGE).is_file()


def identity(path: Path) -> str:
    """Return what changes when a checkpoint or its evaluation does.

    Args:
        path: As for `default_folder`.
    """
    folder, digest = _checkpoint(path), hashlib.sha256()
    index = folder / INDEX_FILE
    if index.is_file():  # it has the checksum of every file
        digest.update(index.read_bytes())
    else:
        for file in sorted(folder.rglob("*.safetensors")):
            facts = file.stat()
            digest.update(f"{file.relative_to(folder)} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    if (folder / EVAL_FILE).is_file():
        digest.update((folder / EVAL_FILE).read_bytes())
    return digest.hexdigest()


def fits(folder: Path, path: Path, asked: dict[str, Any]) -> bool:
    """Tell whether a folder has the report of a checkpoint as it is now, made with these options.

    Args:
        folder: Which may not exist.
        path: The checkpoint, see `default_folder`.
        asked: Options by name, None where one was not given.
    """
    if not is_report(folder):
        return False
    try:
        index = read_index(folder)
    except UserError:
        return False
    return index.asked == asked and index.identity == identity(path)


def read_index(folder: Path) -> Index:
    """Read what a folder holds.

    Raises:
        UserError: If it is no report of this format, or if a file is missing or too short.
    """
    try:
        content = json.loads((folder / INDEX).read_bytes())
        if content["saekit_report"] != FORMAT:
            raise UserError(f"{folder} was made by another version of saekit: delete it and make it again")
        index = Index(
            build=str(content["build"]),
            identity=content["identity"],
            asked=content["asked"],
            text=Column(**content["text"]),
            layers=tuple(tuple(Column(**each) for each in layer) for layer in content["layers"]),
        )
        files = {TEXT: (index.text,)} | {layer_file(number): each for number, each in enumerate(index.layers)}
        whole = (folder / PLOTLY).is_file() and all(_holds(folder / name, each) for name, each in files.items())
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX} is damaged ({error!r}): delete {folder} and make it again") from None
    if not whole:
        raise UserError(f"{folder} is not complete: delete it and make it again")
    return index


def _holds(file: Path, columns: tuple[Column, ...]) -> bool:
    size = file.stat().st_size
    return all(each.offset >= 0 and each.rows >= 0 and each.offset + each.bytes <= size for each in columns)
