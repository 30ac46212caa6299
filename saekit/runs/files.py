"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_at_once(file: Path, text: str) -> None:
    """Write a file of which a crash leaves the old content or the new one, never a part of it.

    Raises:
        OSError: If it cannot be written; what was there stays, and nothing else does.
    """
    unfinished = file.with_name(f"{file.name}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        flush(unfinished)
        os.replace(unfinished, file)
    except OSError:
        with suppress(OSError):  # it was not written, or cannot be taken away either
            unfinished.unlink()
        raise
    flush(file.parent)


def flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
