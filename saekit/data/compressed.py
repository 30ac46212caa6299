"""Make compressed files readable for `datasets`, which itself unpacks .gz only in formats that it reads as a stream."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import xxhash

from saekit.data.files import COMPRESSED, Files, ending
from saekit.errors import UserError


def readable(files: Files) -> dict[str, list[str]]:
    """Return paths by split that `datasets.load_dataset` can read, after unpacking files if necessary.

    Raises:
        UserError: If no installed library reads .zst files.
        OSError: If a compressed file is damaged, or the disk is too full to unpack it.
    """
    if "zstd" in files.compressions:
        read_zstd()
    if files.format != "parquet":
        return files.by_split
    return {split: [_unpacked(file) for file in paths] for split, paths in files.by_split.items()}


def _unpacked(file: str) -> str:
    """Unpack a compressed file, once, into the cache of `datasets`, for formats that need random access."""
    import pyarrow as pa
    from datasets import config

    end = ending(file)
    if not end.compression:
        return file
    about = os.stat(file)
    key = xxhash.xxh3_64_hexdigest(f"{os.path.abspath(file)} {about.st_size} {about.st_mtime_ns}".encode())
    target = Path(config.HF_DATASETS_CACHE) / "unpacked" / f"{key}{end.format}"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with pa.input_stream(file, compression=COMPRESSED[end.compression]) as packed, partial.open("wb") as out:
                shutil.copyfileobj(packed, out)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return str(target)


class ZstdReader(io.RawIOBase):
    """Reads all frames of a zstd stream. The package `zstandard` stops after the first frame."""

    def __init__(self, stream: Any) -> None:
        import pyarrow as pa

        self._unpacked = pa.CompressedInputStream(stream, "zstd")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read unpacked bytes into the buffer, and return how many."""
        found = self._unpacked.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def read_zstd() -> None:
    """Make fsspec, which `datasets` uses to open files, read .zst with Arrow.

    Raises:
        UserError: If this build of pyarrow does not support zstd.
    """
    import fsspec.compression
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        raise UserError(
            "the data set has .zst files, but this pyarrow cannot read them: install one with zstd (pip install "
            "--force-reinstall pyarrow), or unpack the files"
        )
    write = fsspec.compression.compr.get("zstd")

    def open_zstd(stream: Any, mode: str = "rb", **options: Any) -> Any:
        if "r" in mode:
            return io.BufferedReader(ZstdReader(stream))
        if write is None:
            raise ValueError("writing zstd needs the package zstandard")
        return write(stream, mode=mode, **options)

    if getattr(write, "__name__", "") != open_zstd.__name__:
        fsspec.compression.register_compression("zstd", open_zstd, "zst", force=True)
