"""Files, folders and links that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from saekit.runs.layout import doomed_folder

CHECKSUM = "xxh3_128"
"""Finds damage at memory speed, where a cryptographic hash takes longer than the writing; `xxhsum -H2` prints it."""

CANNOT_FLUSH_FOLDERS = frozenset(
    {errno.EACCES, errno.EBADF, errno.EINVAL, errno.EISDIR, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}
)
"""Errors of a file system that has no way to flush a folder, in contrast to a disk that is full or broken."""


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
    """Have the operating system write a file, or a folder's list of names, to the disk.

    Some file systems cannot flush a folder (object stores and others mounted through FUSE, network disks): when they
    store its list of names is up to them then, and a save does not fail for it. A file is always flushed.

    Raises:
        OSError: If the disk refuses.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH_FOLDERS or not path.is_dir():
            raise


def point(link: Path, folder: Path) -> None:
    """Make a link to a sibling folder, replacing an old one in a single step."""
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)
    flush(link.parent)


def discard(folder: Path) -> None:
    """Delete a folder so that it never looks like a checkpoint with files missing."""
    if folder.exists():
        doomed = doomed_folder(folder)
        if folder != doomed:
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(folder, doomed)
        shutil.rmtree(doomed)


def is_as_listed(file: Path, expected: Any) -> bool:
    """Tell whether a file has the size and the checksum that an index lists of it.

    Raises:
        OSError: If it cannot be read.
    """
    # The size first: it costs nothing.
    known = isinstance(expected, Mapping) and file.stat().st_size == expected.get("bytes")
    return known and fingerprint(file) == expected


def fingerprint(file: Path) -> dict[str, Any]:
    """Return a file's size and checksum."""
    digest = xxhash.xxh3_128()
    size = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, CHECKSUM: digest.hexdigest()}
