"""This machine's rates: `saekit plan --calibrate` measures them, and the user's cache stores them for every plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from saekit.errors import UserError
from saekit.runs.files import write_at_once

VERSION = 1
"""The version of the file. A file of another version cannot be read."""
FORMAT = ConfigDict(extra="forbid", allow_inf_nan=False)
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, config=FORMAT)
class PassCost:
    """Seconds of a layer's forward and backward pass over a chunk of tokens, without the encoder's matmul.

    The coefficients are fitted to passes of several shapes, so each includes all work that grows with its unit.
    """

    score: NotNegative
    """Seconds per token and latent (N·M): the search for the largest scores."""
    term: NotNegative
    """Seconds per token, active latent and dimension (N·k·D): exact values, decoder, gradients."""
    weight: NotNegative
    """Seconds per weight of the encoder (M·D): its copy in low precision, the gradients of both matrices."""
    call: NotNegative
    """Seconds per call."""


@dataclass(frozen=True, config=FORMAT)
class Network:
    """Speeds between ranks, in bytes per second that one rank sends while all send."""

    all_reduce: Positive
    point_to_point: Positive


@dataclass(frozen=True, config=FORMAT)
class Rates:
    """Measured rates of one kind of device, on a CPU with all threads of the process."""

    measured: str
    """The date of the measurement."""
    matmul: Mapping[str, Positive]
    """Operations per second, 2 per multiply-add, by type: fp32, bf16, int8."""
    bandwidth: Positive
    """Bytes read and written per second by a copy."""
    block: Mapping[str, NotNegative]
    """Seconds per token, dimension and block of a language model, without its matmuls, by type."""
    passes: Mapping[str, PassCost]
    """By kernels and type of selection, such as `cpu int8`."""
    update: Mapping[str, Positive]
    """Seconds per parameter of an optimizer's step, by `optimizer_key`; for muon at `MUON_WIDTH`."""
    network: Mapping[int, Network] = Field(default_factory=dict)
    """Speeds between ranks, by number of ranks."""


@dataclass(frozen=True, config=FORMAT)
class Kept:
    """The content of the file."""

    version: int
    devices: Mapping[str, Rates]
    """Rates by `device_key`."""


FILE = TypeAdapter(Kept)


def cache_file() -> Path:
    """Return the file of rates: `$XDG_CACHE_HOME/saekit/rates.json`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "saekit" / "rates.json"


def device_key(device: str) -> str:
    """Return the key of a device's rates: its name, the number of CPU threads, and torch's version."""
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def optimizer_key(optimizer: str, moments_dtype: str) -> str:
    """Return the key of an optimizer's rate, such as `adam`, `adam bf16` or `signum`."""
    return f"{optimizer} {moments_dtype}" if moments_dtype != "fp32" else optimizer


def read_rates(key: str) -> tuple[Rates | None, str | None]:
    """Return a device's rates, if they have been measured, and the problem with the file, if there is one."""
    try:
        return _read().get(key), None
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError) as error:
        return None, f"{cache_file()} cannot be read ({_reason(error)}): replace it with --calibrate"


def keep_rates(found: Mapping[str, Rates]) -> Path:
    """Store rates in the cache, where they replace older ones of the same devices.

    The network rates for other numbers of ranks stay.

    Args:
        found: Rates by `device_key`.

    Raises:
        UserError: If the file cannot be written.
    """
    file = cache_file()
    try:
        devices = dict(_read())
    except (OSError, ValueError):  # there is no file, or it cannot be used
        devices = {}
    for key, rates in found.items():
        older = devices[key].network if key in devices else {}
        devices[key] = replace(rates, network={**older, **rates.network})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_at_once(file, FILE.dump_json(Kept(VERSION, devices), indent=1).decode() + "\n")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({_reason(error)}): set XDG_CACHE_HOME to another folder") from None
    return file


def _read() -> Mapping[str, Rates]:
    kept = FILE.validate_json(cache_file().read_bytes())
    if kept.version != VERSION:
        raise ValueError(f"it has version {kept.version}, this saekit reads version {VERSION}")
    return kept.devices


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
    return getattr(error, "strerror", None) or str(error)
