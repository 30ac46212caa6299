"""The weights of a coder in a safetensors file: those that `cfg.json` describes, and no others."""

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
    """Read the tensors of a safetensors file that have to be there, in the shapes that `cfg.json` gives them.

    Args:
        file: The file.
        shapes: By name.
        device: Where the tensors go.
        absent: Names of tensors that only another kind of coder has.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, a tensor is missing, has another shape or holds no floating-point numbers,
            or they are of several types; or if there is one that `cfg.json` excludes.
    """
    tensors = _read_weights(file, device)
    for name in sorted(tensors.keys() & absent):
        raise ValueError(f"{file} has a tensor {name!r}, which the coder that cfg.json describes does not have")
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{file} has no tensor {name!r}; it has {', '.join(map(repr, sorted(tensors)))}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{file}: {name} has shape {list(tensors[name].shape)}, but cfg.json says {list(shape)}")
        if tensors[name].dtype not in WEIGHT_TYPES:
            raise ValueError(f"{file}: {name} holds {_type(tensors[name])}, not float32, float64, float16 or bfloat16")
    if len({tensors[name].dtype for name in shapes}) > 1:
        types = ", ".join(f"{name} {_type(tensors[name])}" for name in shapes)
        raise ValueError(f"{file} holds tensors of several types ({types}): an SAE's are all of one")
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
