"""Read and check the entries of a `cfg.json`, so that a damaged file is never loaded as a different SAE."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypeGuard

from saekit.registry import SELECTIONS

EXPANSION_FACTOR = 32
"""The default, as in sparsify, if `cfg.json` has neither an expansion factor nor a number of latents."""
SWITCHES = ("normalize_decoder", "multi_topk", "signed", "transcode", "skip_connection")
"""Entries of `cfg.json` that are true or false."""


def read_config(file: Path) -> dict[str, Any]:
    """Read a `cfg.json` and check that it describes a coder that saekit can compute.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a JSON object, or if an entry is missing or has an invalid value.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object")
    for key in ("d_in", "k"):
        if not is_count(config.get(key)):
            raise ValueError(f"{file} has no whole number {key!r} of at least 1")
    size = "num_latents" if config.get("num_latents") not in (None, 0) else "expansion_factor"
    if not is_count(config.get(size, EXPANSION_FACTOR)):
        raise ValueError(f"{file} has no whole number {size!r} of at least 1")
    for key in SWITCHES:
        if not isinstance(config.get(key, False), bool):
            raise ValueError(f"{file}: {key!r} is {config[key]!r}, expected true or false")
    activation = config.get("activation", "topk")
    if not isinstance(activation, str):
        raise ValueError(f"{file}: 'activation' is {activation!r}, expected a name")
    if config.get("signed"):
        raise ValueError(f"{file}: 'signed' is true, but saekit's {activation!r} has no signed values")
    if activation not in SELECTIONS:
        raise ValueError(f"{file}: {unknown_activation(activation, config.get('plugin'))}")
    for key in ("max_norm", "max_norm_out"):
        if config.get(key) is not None and not is_length(config[key]):
            raise ValueError(f"{file} has no number {key!r} of at least 0")
    if config.get("d_out") is not None and not is_count(config["d_out"]):
        raise ValueError(f"{file} has no whole number 'd_out' of at least 1")
    _check_kind(file, config)
    return config


def _check_kind(file: Path, config: dict[str, Any]) -> None:
    """Check the entries that distinguish transcoders, crosscoders and autoencoders."""
    d_in, d_out, transcodes = config["d_in"], config.get("d_out") or config["d_in"], config.get("transcode", False)
    if not transcodes:
        for_transcoders = {
            "d_out": d_out != d_in,
            "a skip connection": bool(config.get("skip_connection")),
            "max_norm_out": config.get("max_norm_out") is not None,
        }
        for what in (name for name, present in for_transcoders.items() if present):
            raise ValueError(f"{file} describes an autoencoder with {what}, which only transcoders have")
    for key, width in (("reads", d_in), ("writes", d_out)):
        _check_widths(file, key, config.get(key, {}), width)
    read, written = (list(config.get(key, {}).items()) for key in ("reads", "writes"))
    if bool(read) != bool(written):
        raise ValueError(f"{file} has only one of 'reads' and 'writes'")
    if read and (read == written) == transcodes:
        kind = "a transcoder" if transcodes else "an autoencoder"
        raise ValueError(
            f"{file} describes {kind} that reads and writes {'the same' if transcodes else 'different'} hookpoints"
        )


def _check_widths(file: Path, key: str, widths: Any, total: int) -> None:
    """Check the widths of the hookpoints that a coder reads or writes. Empty if the folder's name is the hookpoint."""
    if not isinstance(widths, dict) or not all(name and is_count(width) for name, width in widths.items()):
        raise ValueError(f"{file}: {key!r} must map hookpoints to their widths")
    if widths and sum(widths.values()) != total:
        raise ValueError(f"{file}: the widths of {key!r} add up to {sum(widths.values())}, not {total}")


def unknown_activation(activation: Any, plugin: Any = None) -> str:
    """Return a message that no such selection is registered, and what to do."""
    known = f"activation {activation!r} is none of {', '.join(SELECTIONS.names())}"
    if plugin is None:
        return f"{known}: pass the file of the plug-in that registers it with --plugin"
    return f"{known}: pass the file of its plug-in, {' '.join(str(plugin).split())}, with --plugin"


def is_count(value: Any) -> bool:
    """Return whether a value from a file is a whole number of at least 1 that fits into an int64."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63


def is_length(value: Any) -> TypeGuard[float]:
    """Return whether a value from a file is a finite number of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
