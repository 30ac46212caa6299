"""Read a coder's weights from a safetensors file, and check that they are the ones that `cfg.json` describes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saekit.errors import first_line

WEIGHT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def read_tensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], device: torch.device | str, absent: Collection[str] = ()
) -> dict[str, Tensor]:
    """Read the required tensors of a safetensors file and check their shapes and types.

    Args:
        file: The file.
        shapes: The required tensors' shapes, by name, as `cfg.json` implies them.
        device: Where the tensors go.
        absent: Names of tensors that must not be in the file, because only other kinds of coders have them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, if a tensor is missing, has another shape or is not floating-point, if the
            tensors differ in type, or if the file has a tensor of `absent`.
    """
    tensors = _read_weights(file, device)
    for name in sorted(tensors.keys() & absent):
        raise ValueError(f"{file} has a tensor {name!r}, but the coder described by cfg.json has none")
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{file} has no tensor {name!r}; it has {', '.join(map(repr, sorted(tensors)))}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{file}: {name} has shape {list(tensors[name].shape)}, but cfg.json says {list(shape)}")
        if tensors[name].dtype not in WEIGHT_TYPES:
            raise ValueError(f"{file}: {name} holds {_type(tensors[name])}, not float32, float64, float16 or bfloat16")
    if len({tensors[name].dtype for name in shapes}) > 1:
        types = ", ".join(f"{name} {_type(tensors[name])}" for name in shapes)
        raise ValueError(f"{file} has tensors of different types ({types}): an SAE's tensors must have one type")
    return {name: tensors[name] for name in shapes}


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _read_weights(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        return load_file(file, device=str(device))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except SafetensorError as error:
        said = first_line(error)
        raise ValueError(f"{file} is damaged or cut short ({said}); restore it or use another checkpoint") from None
