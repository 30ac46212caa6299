"""An operation between its call and its delivery, and what waits for it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.strict.checks import StrictError

Run = Callable[[list[Tensor], list[Tensor]], dist.Work]
"""Hands gloo copies of the inputs, and memory for the outputs."""
PASSED_ON = (str(Path(torch.__file__).parent), "deepspeed/comm", "deepspeed/utils", str(Path(__file__).parent))
"""Code that only passes a call on."""


@dataclass(eq=False)
class Operation:
    """One collective of this rank."""

    text: str
    """Name, root, shapes and types: the same on all ranks."""
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    run: Run
    splits: tuple[list[int], list[int]] | None = None
    """What an all-to-all receives from each rank and sends to each."""
    number: int = 0
    place: str = ""
    _sent: list[Tensor] = field(default_factory=list)
    _arrived: list[Tensor] | None = None

    def begin(self, number: int) -> None:
        """Keep what is sent, and spoil what is to be received."""
        self.number, self.place = number, caller()
        self._sent = [raw(tensor).clone() for tensor in self.inputs]
        for tensor in self.outputs:
            spoil_(tensor)

    @property
    def carried_out(self) -> bool:
        """Whether the ranks have exchanged its data, which may not be delivered yet."""
        return self._arrived is not None

    def carry_out(self) -> None:
        """Exchange data with the other ranks."""
        arrived = [torch.empty_like(raw(tensor)) for tensor in self.outputs]
        # gloo writes into what it reduces.
        sent = [like(each.clone(), tensor) for each, tensor in zip(self._sent, self.inputs, strict=True)]
        self.run(sent, [like(each, tensor) for each, tensor in zip(arrived, self.outputs, strict=True)]).wait()
        self._arrived = arrived

    def deliver(self) -> None:
        """Give outputs their values.

        Raises:
            StrictError: If someone has written where the device could still be reading or writing.
        """
        written = {tensor.untyped_storage().data_ptr() for tensor in self.outputs}
        for tensor, sent in zip(self.inputs, self._sent, strict=True):
            # What is reduced or gathered in place has been spoiled: it is an output.
            if tensor.untyped_storage().data_ptr() not in written and not raw(tensor).equal(sent):
                raise StrictError(f"{self}: an input was changed before wait()")
        for tensor in self.outputs:
            if not raw(tensor).equal(raw(spoil_(torch.empty_like(tensor.data)))):
                raise StrictError(f"{self}: an output was written to before wait()")
        for tensor, arrived in zip(self.outputs, self._arrived or (), strict=True):
            raw(tensor).copy_(arrived)
        self._sent, self._arrived = [], []

    def __str__(self) -> str:
        return f"operation {self.number}, {self.text} ({self.place})"


class Pending(dist.Work):
    """What an operation returns, or several that were called together."""

    def __init__(self, finish: Callable[[Operation], None], operations: Sequence[Operation]) -> None:
        super().__init__()
        self._finish, self.operations = finish, list(operations)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Deliver."""
        with torch._C.DisableTorchFunction():
            while self.operations:  # what was sent is not kept here, so that the caller can free it
                self._finish(self.operations.pop(0))
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        """Tell whether somebody has waited: nothing else completes it."""
        return not self.operations

    is_success = is_completed

    def get_future(self) -> torch.futures.Future:
        """Wait, and return a future that has its value."""
        outputs = [tensor for each in self.operations for tensor in each.outputs]
        self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(outputs)
        return future


def raw(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, in its memory; autograd does not learn of what is written to them."""
    return tensor.data.view(-1).view(torch.uint8)


def like(raw_bytes: Tensor, tensor: Tensor) -> Tensor:
    """Bytes as a tensor of that type and shape; bools stay bytes, as on NCCL's wire."""
    dtype = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
    return raw_bytes.view(dtype).view(tensor.shape)


def spoil_(tensor: Tensor) -> Tensor:
    """Fill with what nobody takes for a result: NaN, or the largest number of the type."""
    dtype = tensor.dtype
    worst = float("nan") if dtype.is_floating_point else 1 if dtype == torch.bool else torch.iinfo(dtype).max
    tensor.data.fill_(worst)
    return tensor


def caller() -> str:
    """File and line that called the operation."""
    frame = sys._getframe(1)
    while frame.f_back is not None and any(part in frame.f_code.co_filename for part in PASSED_ON):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
