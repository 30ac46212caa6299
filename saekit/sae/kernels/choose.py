"""Choose the kernels for a device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from saekit.sae.kernels import eager, native_build, native_ops, torch_ops
from saekit.sae.kernels.row_sums import RowSums
from saekit.sae.kernels.sparse import Sparse

BACKENDS = ("eager", "cpu", "native", "triton")
SELECT_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}
"""The type in which candidates are found, by its name in `--select-dtype`. None is the parameters' own type."""


class Kernels(Protocol):
    """The functions that compute an SAE. `eager` documents their results."""

    @property
    def name(self) -> str:
        """Return the backend's name, one of `BACKENDS`."""

    @property
    def select_dtype(self) -> torch.dtype | None:
        """Return the type in which candidates are found. None is the parameters' own type."""

    def encode_topk(
        self, x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, *, centre_D: Tensor | None = None, parts: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Compute `eager.encode_topk`."""

    def decode(self, acts_NK: Tensor, indices_NK: Tensor, W_MD: Tensor) -> Tensor:
        """Compute `eager.decode`."""

    def autoencode(
        self,
        x_ND: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        W_dec_MD: Tensor,
        centre_D: Tensor | None,
        k: int,
        threshold: Tensor | None = None,
        parts: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `eager.autoencode`."""

    def autoencode_nested(
        self,
        x_ND: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        W_dec_MD: Tensor,
        centre_D: Tensor | None,
        k: int,
        prefixes: tuple[int, ...],
        threshold: Tensor | None = None,
        parts: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `eager.autoencode_nested`."""

    @property
    def adam_(self) -> Callable[..., None]:
        """Return a function that computes `eager.adam_`. Kernels that defer gradients also accept `RowSums`."""

    def sum_rows(self, sums: RowSums) -> Tensor:
        """Compute `RowSums.dense`."""


class Eager:
    """The reference implementation as `Kernels`."""

    name = "eager"
    select_dtype = None
    encode_topk = staticmethod(eager.encode_topk)
    decode = staticmethod(eager.decode)
    autoencode = staticmethod(eager.autoencode)
    autoencode_nested = staticmethod(eager.autoencode_nested)
    adam_ = staticmethod(eager.adam_)
    sum_rows = staticmethod(RowSums.dense)


def choose_kernels(backend: str, select_dtype: str, device: torch.device) -> Kernels:
    """Return the kernels for a device.

    Args:
        backend: One of `BACKENDS`, or `auto` for `auto_backend`.
        select_dtype: One of `SELECT_DTYPES`, or `auto` for `likely_type`.
        device: The SAE's device.

    Raises:
        ValueError: If the backend cannot run on this device or select in this precision.
    """
    if backend == "auto":
        backend = auto_backend(device)
    check_select_dtype(backend, select_dtype, device)
    if backend == "eager":
        return Eager()
    if select_dtype == "auto":
        select_dtype = likely_type(device)
    dtype = SELECT_DTYPES[select_dtype]
    if backend == "cpu":
        return Sparse("cpu", torch_ops, dtype)
    if backend == "native":
        return Sparse("native", _native_ops(device), dtype)
    return Sparse("triton", _triton_ops(device), dtype)


def auto_backend(device: torch.device) -> str:
    """Return `triton` on a CUDA device if it is installed, `native` on a CPU if it compiles, and otherwise `cpu`."""
    if device.type == "cuda":
        return "triton" if has_triton() else "cpu"
    return "native" if device.type == "cpu" and native_build.why_not() is None else "cpu"


def likely_type(device: torch.device) -> str:
    """Return the type in which a device probably selects fastest, from its features. `fastest` measures it on a CPU."""
    return "bf16" if has_fast_bf16(device) else "int8" if has_fast_int8(device) else "fp32"


def check_select_dtype(backend: str, select_dtype: str, device: torch.device) -> None:
    """Check that a backend (not `auto`) can select in this precision on a device.

    Raises:
        ValueError: If it cannot.
    """
    if backend == "eager" and select_dtype not in ("auto", "fp32"):
        raise ValueError(f"the eager kernels cannot select in {select_dtype}: choose fp32 or other kernels")
    if select_dtype == "int8" and (backend == "triton" or device.type != "cpu"):
        raise ValueError("only CPUs can select in int8: choose bf16")


def _native_ops(device: torch.device):  # type: ignore[no-untyped-def]  # a module
    if device.type != "cpu":
        raise ValueError(f"the native kernels need a CPU, but the device is {device.type}")
    if (reason := native_build.why_not()) is not None:
        raise ValueError(f"the native kernels cannot be used: {reason}")
    return native_ops


def _triton_ops(device: torch.device):  # type: ignore[no-untyped-def]  # a module
    if not has_triton():
        raise ValueError("the triton kernels need Triton, but it is not installed: pip install triton")
    from saekit.sae.kernels import triton_ops

    if device.type != "cuda" and not triton_ops.INTERPRETED:
        raise ValueError(f"the triton kernels need a CUDA device, but the device is {device.type}")
    return triton_ops


def update_kernels(kernels: Kernels, device: torch.device) -> Kernels:
    """Return the kernels that update parameters on a device, which can differ from the device that computes the SAE.

    Triton cannot read offloaded parameters, which are on the CPU. The CPU's own kernels update them.

    Args:
        kernels: The SAE's kernels.
        device: Where its parameters are during the optimizer's step.
    """
    if kernels.name == "triton" and device.type == "cpu":
        from saekit.sae.kernels import triton_ops

        if not triton_ops.INTERPRETED:
            return default_kernels("cpu")
    return kernels


@cache
def default_kernels(device_type: str) -> Kernels:
    """Return the kernels of an SAE for which none were chosen: the `auto` backend with exact selection."""
    return choose_kernels("auto", "fp32", torch.device(device_type))


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices faster than float32 ones.

    Among CPUs, those with AMX (Intel) and AMD's with AVX-512 do: 4.5 times the rate of float32 was measured. Intel's
    AVX-512 also has the instructions, but without AMX only half that rate.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and _made_by_amd())


def has_fast_int8(device: torch.device) -> bool:
    """Return whether a device is a CPU that multiplies 8-bit matrices faster than float32 (VNNI: 2 to 3.8 times)."""
    return device.type == "cpu" and torch.cpu._is_vnni_supported()


@cache
def _made_by_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
