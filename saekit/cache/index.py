"""What a cache is of: `index.json`, which is written before the first shard and never changed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import TypeAdapter, ValidationError

from saekit.errors import UserError
from saekit.runs.files import write_at_once

INDEX = "index.json"
FORMAT = 1
MODEL = "model"
"""The folder that holds the language model's config."""
STORES = ("model", "float32", "int8")


@dataclass(frozen=True)
class Index:
    """The run of a language model whose activations are cached."""

    model: str
    revision: str | None
    dataset: str
    data: dict[str, Any]
    """Options of the data set."""
    ctx_len: int
    """T."""
    sequences: int
    """Of the whole cache."""
    data_seed: int | None
    """Seed of the order of the sequences; None is the data set's own order."""
    batch_size: int
    """Sequences per forward pass. Another number can change the last bits of activations."""
    shard_sequences: int
    """Sequences per shard, a multiple of `batch_size`."""
    hookpoints: dict[str, int]
    """Widths by name, in model order."""
    store: str
    """One of `STORES`."""
    compressed: bool
    dtype: str
    """Of the activations as the model made them, such as `bfloat16`."""
    special_tokens: list[int]
    """Ids that `--exclude-special-tokens` excludes."""
    vocabulary: int
    depth: int
    """Blocks of the language model that were needed."""
    weights: str
    """Checksum of the weights of these blocks and of what comes before them."""
    saekit_version: str

    @property
    def num_shards(self) -> int:
        """Return how many shards there are when the cache is complete."""
        return -(-self.sequences // self.shard_sequences)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Return the type of the activations in the files."""
        return {"model": self.made_dtype, "float32": torch.float32, "int8": torch.int8}[self.store]

    @property
    def made_dtype(self) -> torch.dtype:
        """Return the type of the activations as the model made them."""
        return getattr(torch, self.dtype)

    @property
    def read_dtype(self) -> torch.dtype:
        """Return the type of the activations that training gets."""
        return torch.float32 if self.store == "int8" else self.stored_dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes on disk for each token, before compression: activations, int8's scales, the token's id."""
        scales = 4 * len(self.hookpoints) if self.store == "int8" else 0
        return sum(self.hookpoints.values()) * self.stored_dtype.itemsize + scales + 4

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards, before compression."""
        return self.sequences * self.ctx_len * self.bytes_per_token

    @property
    def order_options(self) -> dict[str, Any]:
        """Return the options of a run that visits the sequences in the cache's order."""
        return {"shuffle": False} if self.data_seed is None else {"shuffle": True, "data_seed": self.data_seed}

    @property
    def fingerprint(self) -> str:
        """Return a checksum of what every shard depends on, which each shard repeats."""
        known = {name: value for name, value in asdict(self).items() if name != "saekit_version"}
        return xxhash.xxh3_64_hexdigest(json.dumps(known, sort_keys=True).encode())

    def places(self, shard: int) -> range:
        """Return the places, in the order of the cache, of a shard's sequences."""
        start = shard * self.shard_sequences
        return range(start, min(start + self.shard_sequences, self.sequences))

    def write(self, folder: Path) -> None:
        """Write the index.

        Raises:
            OSError: If it cannot be written.
        """
        write_at_once(folder / INDEX, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")


def shard_file(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard_{shard:06}.safetensors"


def missing_shards(folder: Path, index: Index) -> list[int]:
    """Return the shards that are not there yet."""
    return [shard for shard in range(index.num_shards) if not shard_file(folder, shard).is_file()]


def read_index(folder: Path) -> Index:
    """Read what a cache is of.

    Raises:
        UserError: If there is no cache, or its index is damaged or of a newer saekit.
    """
    try:
        values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no cache of activations: it has no {INDEX}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / INDEX} cannot be read: {error}") from None
    known = {field.name for field in fields(Index)}
    found = values.pop("format", None) if isinstance(values, dict) else None
    if found != FORMAT:
        raise UserError(f"{folder / INDEX} has format {found!r}, and this saekit reads format {FORMAT}")
    if values.keys() != known:
        wrong = ", ".join(sorted(values.keys() ^ known))
        raise UserError(f"{folder / INDEX} is damaged: {wrong} should be there, or should not")
    try:
        index: Index = TypeAdapter(Index).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{folder / INDEX} is damaged: {name} is {first['input']!r}") from None
    for name, fits in _conditions(index).items():
        if not fits:
            raise UserError(f"{folder / INDEX} is damaged: {name} is {getattr(index, name)!r}")
    return index


def _conditions(index: Index) -> dict[str, bool]:
    """Tell which values can be used, beyond their types."""
    counts = ("ctx_len", "sequences", "batch_size", "shard_sequences")
    dtype = getattr(torch, index.dtype, None)
    return {
        **{name: getattr(index, name) > 0 for name in counts},
        "hookpoints": bool(index.hookpoints) and all(width > 0 for width in index.hookpoints.values()),
        "store": index.store in STORES,
        "dtype": isinstance(dtype, torch.dtype) and dtype.is_floating_point,
    }
