"""Writes a report's folder (`folder`), layer by layer, and puts it in place when it is whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from saekit.errors import UserError
from saekit.runs.files import discard, flush
from saekit.views.page.folder import INDEX, ONCE, PAGE, PLOTLY, TEXT, TEXT_COLUMN, Column, Index, is_report, layer_file
from saekit.views.page.packing import smallest


class FolderWriter:
    """Writes the files of a report's folder.

    Attributes:
        build: The word that only this folder has.
    """

    def __init__(self, folder: Path) -> None:
        self.build = secrets.token_hex(16)
        self._folder = folder
        self._layers: list[tuple[Column, ...]] = []
        self._text: Column | None = None

    def add_text(self, numbers_ST: np.ndarray) -> dict[str, Any]:
        """Write the text, int64 `[S, T]`; return what the page has to know of it."""
        (self._text,) = _write(self._folder / TEXT, {TEXT_COLUMN: numbers_ST})
        return {"type": self._text.type, "width": self._text.width}

    def add_layer(self, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
        """Write a layer's arrays; return what the page has to know of them."""
        columns = _write(self._folder / layer_file(len(self._layers)), arrays)
        self._layers.append(columns)
        return [
            {"name": each.name, "type": each.type, "width": each.width, "in_row": each.name not in ONCE}
            for each in columns
        ]

    def finish(self, page: str, identity: str, asked: dict[str, Any]) -> None:
        """Write the page and, as the last file, the index."""
        if self._text is None:
            raise RuntimeError("a report has a text")
        index = Index(self.build, identity, asked, self._text, tuple(self._layers))
        for name, text in ((PLOTLY, get_plotlyjs()), (PAGE, page), (INDEX, index.to_json())):
            (self._folder / name).write_text(text, encoding="utf-8")
        for file in sorted(self._folder.iterdir()):
            flush(file)


def _write(file: Path, arrays: Mapping[str, np.ndarray]) -> tuple[Column, ...]:
    columns = []
    with file.open("wb") as stream:
        for name, array in arrays.items():
            small = smallest(array)
            width = int(np.prod(small.shape[1:]))
            columns.append(Column(name, small.dtype.name, len(small), width, stream.tell()))
            stream.write(np.ascontiguousarray(small).tobytes())
    return tuple(columns)


@contextmanager
def new_folder(folder: Path) -> Iterator[FolderWriter]:
    """Fill a folder next to the one that is meant, and put it in its place when all went well.

    Raises:
        UserError: If it cannot be written, or if something else is in its place.
    """
    check_place(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield FolderWriter(partial)
            discard(folder)
            os.replace(partial, folder)
            flush(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror})") from None


def check_place(folder: Path) -> None:
    """Check that a folder may be made, or replaced by a new report.

    Raises:
        UserError: If there is no folder around it, or if it holds anything but a report.
    """
    if not folder.parent.is_dir():
        raise UserError(f"--output {folder}: there is no folder {folder.parent}")
    if folder.exists() and not is_report(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder} exists and is no report: name another folder")
