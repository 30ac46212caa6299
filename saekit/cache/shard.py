"""One shard of a cache: a safetensors file with the activations of some sequences, sequence by sequence.

For each hookpoint there is a tensor `[S, T, D]`, or, compressed, one of bytes that has a zstd frame for each sequence,
and `NAME.ends` with the end of each frame. int8 adds `NAME.scale` `[S, T]`: what a token's numbers are multiplied by.
`NAME.check` `[S]` has a checksum of each sequence, which is compared whenever it is read. `ids` `[S, T]` has the token
ids. The file's metadata names the cache and the shard, so a shard of another cache is not taken for one of this.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from saekit.cache.index import INDEX, Index, shard_file
from saekit.errors import UserError
from saekit.runs.files import flush

IDS = "ids"
SHARD = "shard"
"""The entry of the metadata: `Index.fingerprint`, and the shard's number. A second one would make the order random."""


def quantized(x_STD: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to int8, with one scale per token.

    Args:
        x_STD: `[S, T, D]`.

    Returns:
        int8 `[S, T, D]`, and the scales, float32 `[S, T]`. Their product is at most half a scale away from `x_STD`: a
        254th of the token's largest magnitude.
    """
    scale_ST = x_STD.float().abs().amax(2) / 127
    safe_ST = scale_ST.clamp_min(torch.finfo(torch.float32).tiny)
    return (x_STD.float() / safe_ST[..., None]).round().to(torch.int8), scale_ST


class ShardWriter:
    """Collects the sequences of a shard in memory, and writes them at once.

    Args:
        index: The cache.
        shard: Its number.
    """

    def __init__(self, index: Index, shard: int) -> None:
        self._index, self._shard = index, shard
        self._count = len(index.places(shard))
        self._full = 0
        dtype = index.stored_dtype
        self._tensors = {IDS: torch.empty(self._count, index.ctx_len, dtype=torch.int32)}
        for name, width in index.hookpoints.items():
            self._tensors[name] = torch.empty(self._count, index.ctx_len, width, dtype=dtype)
            if index.store == "int8":
                self._tensors[f"{name}.scale"] = torch.empty(self._count, index.ctx_len)

    def add(self, ids_BT: Tensor, acts: Mapping[str, Tensor]) -> None:
        """Take the next sequences: token ids `[B, T]`, and by hookpoint activations `[B·T, D]`."""
        rows = slice(self._full, self._full + len(ids_BT))
        self._full = rows.stop
        self._tensors[IDS][rows] = ids_BT.int()
        for name, x_ND in acts.items():
            x_BTD = x_ND.unflatten(0, ids_BT.shape)
            if self._index.store == "int8":
                x_BTD, scale_BT = quantized(x_BTD)
                self._tensors[f"{name}.scale"][rows] = scale_BT.cpu()
            self._tensors[name][rows] = x_BTD.to("cpu", self._index.stored_dtype)

    def write(self, folder: Path) -> None:
        """Write the shard; it is there as a whole, or not at all.

        Raises:
            OSError: If it cannot be written.
        """
        from safetensors.torch import save_file

        assert self._full == self._count, "all sequences are there"
        out = dict(self._tensors)
        for name in (IDS, *self._index.hookpoints):
            raw_SB = _raw(self._tensors[name])
            scale = self._tensors.get(f"{name}.scale")
            checks = [_check(raw_SB[row], None if scale is None else scale[row]) for row in range(self._count)]
            out[f"{name}.check"] = torch.tensor(np.array(checks, np.uint64).astype(np.int64))
            if self._index.compressed and name != IDS:
                frames = [_packed(raw_B, self._tensors[name].element_size()) for raw_B in raw_SB]
                out[name] = torch.from_numpy(np.frombuffer(b"".join(frames), np.uint8).copy())
                out[f"{name}.ends"] = torch.tensor(np.cumsum([len(frame) for frame in frames]))
        file = shard_file(folder, self._shard)
        partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            save_file(out, partial, {SHARD: _mark(self._index, self._shard)})
            shutil.copymode(folder / INDEX, partial)  # safetensors lets nobody else read it
            flush(partial)
            os.replace(partial, file)
        except BaseException as error:
            with suppress(OSError):
                partial.unlink()
            if isinstance(error, Exception) and not isinstance(error, OSError):
                raise OSError(*_of_safetensors(error)) from error
            raise
        flush(folder)


def _mark(index: Index, shard: int) -> str:
    return f"{index.fingerprint} {shard}"


def _of_safetensors(error: Exception) -> tuple[int, str]:
    """Return the number and words of a system's error, which safetensors reports as an error of its own."""
    text = str(error)
    number = text.partition("os error ")[2].partition(")")[0]
    return (int(number), os.strerror(int(number))) if number.isdigit() else (0, text)


def _raw(x: Tensor) -> np.ndarray:
    """Return a tensor's bytes, uint8 `[S, bytes of a sequence]`."""
    return x.contiguous().view(len(x), -1).view(torch.uint8).numpy()


def _check(raw_B: np.ndarray, scale_T: Tensor | None) -> int:
    digest = xxhash.xxh3_64(raw_B.data)
    if scale_T is not None:
        digest.update(scale_T.numpy().data)
    return digest.intdigest()


def _packed(raw_B: np.ndarray, itemsize: int) -> bytes:
    """Compress a sequence: its numbers' first bytes, then their second bytes, ..., in which zstd finds more alike."""
    import pyarrow as pa

    planes = np.ascontiguousarray(raw_B.reshape(-1, itemsize).T)
    return pa.Codec("zstd", 1).compress(planes.reshape(-1), asbytes=True)


def _unpacked(frame: bytes, itemsize: int, size: int) -> np.ndarray:
    import pyarrow as pa

    planes = np.frombuffer(pa.Codec("zstd").decompress(frame, size, asbytes=True), np.uint8)
    return np.ascontiguousarray(planes.reshape(itemsize, -1).T).reshape(-1)


class ShardReader:
    """Reads single sequences of a shard, which is mapped into memory.

    Args:
        folder: The cache.
        index: What it is of.
        shard: The shard's number.

    Raises:
        UserError: If the file is missing or damaged.
    """

    def __init__(self, folder: Path, index: Index, shard: int) -> None:
        from safetensors import SafetensorError, safe_open

        self._file, self._index = shard_file(folder, shard), index
        count = len(index.places(shard))
        try:
            self._open = safe_open(self._file, "pt")
            mark = (self._open.metadata() or {}).get(SHARD)
            self._checks = {name: self._open.get_tensor(f"{name}.check") for name in (IDS, *index.hookpoints)}
            self._ends = {
                name: [0, *self._open.get_tensor(f"{name}.ends").tolist()]
                for name in (index.hookpoints if index.compressed else ())
            }
        except FileNotFoundError:
            raise UserError(f"{self._file} is missing: continue the cache with the saekit cache that made it") from None
        except (OSError, SafetensorError) as error:
            raise self._damaged(str(error)) from None
        if mark != _mark(index, shard):
            raise self._damaged(f"it is not shard {shard} of the cache that {INDEX} describes")
        if any(len(check) != count for check in self._checks.values()):
            raise self._damaged(f"it should have {count} sequences")

    def ids(self, rows: range) -> Tensor:
        """Return token ids, int64 `[S, T]`, of some of the shard's sequences."""
        return self._whole(IDS, rows, torch.int32, (self._index.ctx_len,)).long()

    def acts(self, name: str, rows: range) -> Tensor:
        """Return a hookpoint's activations `[S, T, D]` of some of the shard's sequences.

        Raises:
            UserError: If what is stored is not what was written.
        """
        index = self._index
        sizes = (index.ctx_len, index.hookpoints[name])
        if index.store != "int8":
            return self._whole(name, rows, index.stored_dtype, sizes)
        scale_ST: Tensor = self._slice(f"{name}.scale", rows)
        return self._whole(name, rows, torch.int8, sizes, scale_ST).float() * scale_ST[..., None]

    def _whole(
        self, name: str, rows: range, dtype: torch.dtype, sizes: tuple[int, ...], scale_ST: Tensor | None = None
    ) -> Tensor:
        if name in self._ends:
            found = torch.empty(len(rows), *sizes, dtype=dtype)
            raw_SB = _raw(found)
            ends = self._ends[name]
            for row, number in enumerate(rows):
                frame = self._slice(name, range(ends[number], ends[number + 1])).numpy().tobytes()
                try:
                    raw_SB[row] = _unpacked(frame, dtype.itemsize, raw_SB.shape[1])
                except (OSError, ValueError) as error:
                    raise self._damaged(f"{name} of sequence {number}: {error}") from None
        else:
            found = self._slice(name, rows)
            raw_SB = _raw(found)
        for row, number in enumerate(rows):
            check = _check(raw_SB[row], None if scale_ST is None else scale_ST[row])
            if check != int(self._checks[name][number]) % 2**64:
                raise self._damaged(f"{name} of sequence {number} is not what was written")
        return found

    def _slice(self, name: str, rows: range) -> Any:
        from safetensors import SafetensorError

        try:
            return self._open.get_slice(name)[rows.start : rows.stop].contiguous()
        except (OSError, SafetensorError, IndexError) as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self._file} is damaged ({why}): delete it, and saekit cache will write it again")


def remove_partial(folder: Path, mine: Iterable[int]) -> None:
    """Delete what a killed process left of shards that it was writing."""
    for shard in mine:
        for partial in folder.glob(f".{shard_file(folder, shard).name}.*.tmp"):
            with suppress(OSError):
                partial.unlink()
