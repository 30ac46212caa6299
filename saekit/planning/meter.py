"""Counting the bytes of live tensors while code runs, on the meta device as well, where no tensor takes memory."""

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
"""Bytes of a tensor below which glibc takes it from its heap (the most that it allows, see `saekit.machine`)."""


class Bytes(NamedTuple):
    """A number of bytes, apart for tensors whose memory is handed back when they are freed, and for those whose is not.

    On a CPU `saekit` keeps the C library's heap, from which smaller tensors come, for the next step. On a GPU all bytes
    count as `returned`.
    """

    returned: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        """Both."""
        return self.returned + self.kept

    def __add__(self, other: Bytes) -> Bytes:  # type: ignore[override]
        return Bytes(self.returned + other.returned, self.kept + other.kept)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.returned - other.returned, self.kept - other.kept)

    def times(self, factor: float) -> Bytes:
        """Scaled, to whole bytes."""
        return Bytes(round(self.returned * factor), round(self.kept * factor))

    def most(self, other: Bytes) -> Bytes:
        """Return the larger of each."""
        return Bytes(max(self.returned, other.returned), max(self.kept, other.kept))


NOTHING = Bytes()


def sized(count: int, on_gpu: bool) -> Bytes:
    """Count one tensor."""
    return Bytes(count) if on_gpu or count >= HEAP_BELOW else Bytes(0, count)


def all_of(sizes: Iterable[Bytes]) -> Bytes:
    """Their sum."""
    return sum(sizes, NOTHING)


class Meter(TorchDispatchMode):
    """Counts the storages that operations make, and notices when they are gone.

    What an operation allocates and frees inside itself is not seen, nor is what existed before.

    Args:
        on_gpu: Whether memory is a GPU's; see `Bytes`.
    """

    def __init__(self, on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.live = Bytes()
        """Now."""
        self.peak = Bytes()
        """The most at any time, of each kind."""
        self._sizes: dict[int, Bytes] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what is new in its results: views and in-place results are not."""
        known = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if (key := storage._cdata) not in known and key not in self._sizes:
                self._sizes[key] = sized(storage.nbytes(), self.on_gpu)
                self.live += self._sizes[key]
                self.peak = self.peak.most(self.live)
                weakref.finalize(storage, self._forget, key)
        return out

    def restart(self) -> None:
        """Forget the highest level so far."""
        self.peak = self.live

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class StandIn(TorchFunctionMode):
    """On the meta device, operations that take the memory that they take where they really run.

    See also `run_without_numbers`.

    Args:
        linear_in_8_bits: Whether linear layers round their input to int8 and sum in int32, as bitsandbytes does.
    """

    def __init__(self, linear_in_8_bits: bool = False) -> None:
        super().__init__()
        self.linear_in_8_bits = linear_in_8_bits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Stand in for an operation, or run it."""
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
