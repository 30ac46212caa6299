"""The order of a group's operations, which is the same on all ranks, and their end."""

import ctypes
import hashlib
import os
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from tests.strict.checks import StrictError, check_splits, check_tensors, refuse_objects
from tests.strict.operation import Operation, Pending

PATIENCE = timedelta(seconds=120)
"""An operation to which another rank does not come fails after that time, if the group's own limit is not shorter."""
TEXT = 400
"""Bytes in which a rank describes its operation to the others."""


class Ordered(dist.ProcessGroup):
    """Keeps operations until somebody waits for them; carries them out in the order of their calls."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._patience = min(timeout, PATIENCE)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout=self._patience)
        kind = dist.ProcessGroup.BackendType.CUSTOM
        self._register_backend(torch.device("cpu"), kind, self._gloo)  # torch asks the group for its devices
        self._queue: deque[Operation] = deque()
        self._unclaimed: dict[int, Operation] = {}
        self._count = 0
        self._together: list[Operation] | None = None

    def _begin(self, operation: Operation) -> Pending:
        with torch._C.DisableTorchFunction():
            refuse_objects()
            check_tensors([*operation.inputs, *operation.outputs], operation.text)
            self._count += 1
            operation.begin(self._count)
        self._queue.append(operation)
        self._unclaimed[operation.number] = operation
        if self._together is not None:
            self._together.append(operation)
        return Pending(self._finish, [operation])

    def _begin_each(self, operations: Sequence[Operation]) -> Pending:
        works = [self._begin(operation) for operation in operations]
        return Pending(self._finish, [operation for work in works for operation in work.operations])

    def _finish(self, operation: Operation) -> None:
        """Carry out all that was called up to this operation, in that order, and deliver this one."""
        if self._unclaimed.pop(operation.number, None) is None:
            return
        while not operation.carried_out:
            first = self._queue.popleft()
            try:
                self._compare(first)
                first.carry_out()
            except RuntimeError as error:
                raise self._explained(error, first) from error
        operation.deliver()

    def _explained(self, error: RuntimeError, operation: Operation) -> RuntimeError:
        said = str(error).lower()
        if "timed out" in said:
            waited = self._patience.total_seconds()
            return StrictError(f"{operation}: another rank has not come to it within {waited:g} s")
        if not isinstance(error, StrictError) and os.environ.get("STRICT_LOST") == "hang":
            hang()  # gloo has noticed that another rank is gone
        return error

    def _compare(self, operation: Operation) -> None:
        """Raise, on every rank, if they are not all at the same operation."""
        if self.size() == 1:
            return
        text = f"{operation.number} {operation.text}"
        digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
        if len(set(self._everywhere([digest]).flatten().tolist())) > 1:
            mine = f"{operation.text} ({operation.place})".encode()[:TEXT].ljust(TEXT)
            texts = [bytes(row).decode(errors="replace").strip() for row in self._everywhere(list(mine)).tolist()]
            each = "; ".join(f"rank {rank} calls {text}" for rank, text in enumerate(texts))
            raise StrictError(f"the ranks do not do the same: as operation {operation.number} {each}")
        if operation.splits is not None:
            receive, send = operation.splits
            check_splits(self._everywhere([*receive, *send]), str(operation))

    def _everywhere(self, numbers: list[int]) -> Tensor:
        """Each rank's numbers, as rows."""
        rows = torch.empty(self.size(), len(numbers), dtype=torch.int64)
        self._gloo.allgather([list(rows)], [torch.tensor(numbers)]).wait()
        return rows

    def shutdown(self) -> None:
        """End the group.

        Raises:
            StrictError: If nobody has waited for an operation.
        """
        forgotten = next(iter(self._unclaimed.values()), None)
        self._unclaimed.clear()
        self._queue.clear()
        super().shutdown()
        if forgotten is not None:
            raise StrictError(f"{forgotten}: nobody waited for it")

    def _start_coalescing(self, device: torch.device) -> None:
        self._together = []

    def _end_coalescing(self, device: torch.device) -> Pending:
        together, self._together = self._together, None
        return Pending(self._finish, together or [])


def hang() -> NoReturn:
    """Wait as in a driver's call: no signal's handler runs, and only SIGKILL ends the process."""
    lock = ctypes.create_string_buffer(64)  # of zeros: an unlocked mutex
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(lock)
