"""Read a coder's files without its language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saekit.activations.hookpoints import OTHER
from saekit.activations.sites import Site, site_at
from saekit.errors import UserError
from saekit.runs.layout import STATE_FILE
from saekit.runs.locate import read_json, read_some_tensors
from saekit.sae.storage import CONFIG_FILE as SAE_CONFIG

SCALE = "frame.scale"
"""The tensor with the scale of a crosscoder's hookpoints, in a checkpoint's state."""


def read_weights(file: Path) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Read encoder `[M, D]`, decoder `[M, D_out]`, `b_dec` `[D_out]` and `W_skip` or None, in float32.

    Does not check that encoder and decoder have the same number of rows.

    Raises:
        UserError: If a tensor is missing, has an impossible shape, or is not floating-point.
    """
    found = read_some_tensors(file, ["encoder.weight", "W_dec", "b_dec"], optional=["W_skip"])
    encoder, decoder, b_dec = (found[name] for name in ("encoder.weight", "W_dec", "b_dec"))
    skip = found.get("W_skip")
    if encoder.ndim != 2 or not encoder.numel() or decoder.ndim != 2 or decoder.shape[1:] != b_dec.shape:
        shapes = ", ".join(str(list(each.shape)) for each in (encoder, decoder, b_dec))
        raise UserError(f"{file} is damaged: encoder, decoder and b_dec have the shapes {shapes}")
    if not all(each.is_floating_point() for each in (encoder, decoder, b_dec)):
        raise UserError(f"{file} is damaged: encoder, decoder or b_dec is not floating-point")
    return encoder.float(), decoder.float(), b_dec.float(), None if skip is None else skip.float()


def read_site(hookpoint: str, folder: Path, config: dict[str, Any], d_in: int, d_out: int) -> Site:
    """Return a coder's site, from the content of its `cfg.json`.

    Raises:
        UserError: If `cfg.json` is damaged, or does not say what a transcoder reads.
    """
    reads, writes = mapping(config, "reads"), mapping(config, "writes")
    for widths, total in ((reads, d_in), (writes, d_out)):
        if widths and (not all(isinstance(each, int) for each in widths.values()) or sum(widths.values()) != total):
            raise UserError(f"{folder / SAE_CONFIG} is damaged: the widths {widths} do not add up to {total}")
    try:
        return site_at(hookpoint, d_in, d_out if config.get("transcode") else None, reads, writes)
    except ValueError as error:
        raise UserError(str(error)) from None


def read_scale(folder: Path, d_in: int) -> Tensor | None:
    """Return the scale of a crosscoder's hookpoints in training, `[D]`. None without the training's state."""
    file = folder / STATE_FILE
    found = read_some_tensors(file, (), optional=(SCALE,)).get(SCALE) if file.exists() else None
    return found if found is not None and found.shape == (d_in,) else None


def check_models(coders: Mapping[str, Path], checkpoint: Path, count: int) -> None:
    """Check that there are two language models for crosscoders of two models, and one for other coders.

    Args:
        coders: The coders' folders, by name.
        checkpoint: The checkpoint that they belong to.
        count: The number of models.

    Raises:
        UserError: If there is one model too many or too few.
    """
    for name, folder in coders.items():
        reads = mapping(read_json(folder / SAE_CONFIG), "reads")
        pair = any(hookpoint.startswith(OTHER) for hookpoint in reads)
        if pair and count == 1:
            raise UserError(
                f"{name} is a crosscoder of two models, but {checkpoint} does not name the second one: pass it with "
                "--other-model"
            )
        if not pair and count == 2:
            raise UserError(f"{name} is not a crosscoder of two models: leave out --other-model")


def whole(facts: dict[str, Any], key: str) -> int | None:
    """Return a whole number that fits into an int64, or None."""
    value = facts.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def number(facts: dict[str, Any], key: str) -> float | None:
    """Return a number, or None."""
    value = facts.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if isinstance(value, float) or abs(value) < 2**63 else None


def mapping(facts: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a JSON object, or an empty one."""
    value = facts.get(key)
    return value if isinstance(value, dict) else {}


def text(facts: dict[str, Any], key: str) -> str | None:
    """Return a string that is not empty, or None."""
    value = facts.get(key)
    return value if isinstance(value, str) and value else None
