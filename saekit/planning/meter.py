"""Counts the bytes of live tensors while code runs, also on the meta device, where tensors take no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saekit.activations.observed import run_without_numbers

HEAP_BELOW = 32 * 2**20
"""glibc allocates smaller tensors, in bytes, from its heap. This is its largest threshold, see `saekit.machine`."""


class Bytes(NamedTuple):
    """Bytes of tensors, split by whether the memory returns to the system when they are freed.

    On a CPU, smaller tensors come from the C library's heap, which saekit keeps for the next step. On a GPU, all bytes
    count as `returned`.
    """

    returned: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        """Return the sum of both."""
        return self.returned + self.kept

    def __add__(self, other: Bytes) -> Bytes:  # type: ignore[override]
        return Bytes(self.returned + other.returned, self.kept + other.kept)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.returned - other.returned, self.kept - other.kept)

    def times(self, factor: float) -> Bytes:
        """Return the bytes multiplied by a factor, rounded to whole bytes."""
        return Bytes(round(self.returned * factor), round(self.kept * factor))

    def maximum(self, other: Bytes) -> Bytes:
        """Return the maximum of each kind."""
        return Bytes(max(self.returned, other.returned), max(self.kept, other.kept))


NOTHING = Bytes()


def sized(count: int, on_gpu: bool) -> Bytes:
    """Return the `Bytes` of one tensor."""
    return Bytes(count) if on_gpu or count >= HEAP_BELOW else Bytes(0, count)


def all_of(sizes: Iterable[Bytes]) -> Bytes:
    """Return the sum of several."""
    return sum(sizes, NOTHING)


class Meter(TorchDispatchMode):
    """Counts the storages that operations allocate, until they are freed.

    It does not see temporary memory inside an operation, or tensors that existed before.

    Args:
        on_gpu: Whether the memory is a GPU's, see `Bytes`.
    """

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.live = Bytes()
        """Bytes that are allocated now."""
        self.peak = Bytes()
        """The maximum of `live` so far, of each kind."""
        self._sizes: dict[int, Bytes] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count new storages in its results. Views and in-place results are not new."""
        known = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if (key := storage._cdata) not in known and key not in self._sizes:
                self._sizes[key] = sized(storage.nbytes(), self.on_gpu)
                self.live += self._sizes[key]
                self.peak = self.peak.maximum(self.live)
                weakref.finalize(storage, self._forget, key)
        return out

    def restart(self) -> None:
        """Reset the peak to the current bytes."""
        self.peak = self.live

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class StandIn(TorchFunctionMode):
    """Makes operations on the meta device allocate what they allocate on real devices.

    See also `run_without_numbers`.

    Args:
        linear_in_8_bits: Whether linear layers round their input to int8 and sum in int32, as bitsandbytes does.
    """

    def __init__(self, linear_in_8_bits: bool = False) -> None:
        super().__init__()
        self.linear_in_8_bits = linear_in_8_bits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation or its stand-in."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and self.linear_in_8_bits:
            x, weight = args[0], args[1]
            rounded = x.new_empty(x.shape, dtype=torch.int8)
            sums = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.int32)
            out = x.new_empty(sums.shape)
            del rounded, sums
            return out
        return run_without_numbers(func, args, kwargs)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for each in tree_leaves(values):
        if isinstance(each, Tensor):
            sparse = each.layout == torch.sparse_csr
            parts = (each.crow_indices(), each.col_indices(), each.values()) if sparse else (each,)
            yield from (part.untyped_storage() for part in parts)
