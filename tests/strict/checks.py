"""What NCCL refuses of a single call."""

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Op = dist.ReduceOp

TYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}
"""NCCL's (`ncclDataType` in torch's ProcessGroupNCCL), without float8, which gloo cannot carry."""
REDUCTIONS = {Op.SUM: "SUM", Op.PRODUCT: "PRODUCT", Op.MIN: "MIN", Op.MAX: "MAX"}
"""NCCL's, without the average, which gloo cannot make."""


class StrictError(RuntimeError):
    """Something that only works on gloo."""


def described(*tensors: Tensor) -> str:
    """A tensor's type and shape, or those of several."""
    return ", ".join(f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in tensors) or "nothing"


def check_tensors(tensors: Sequence[Tensor], what: str) -> None:
    """Refuse tensors that are not the device's, not dense, contiguous and of a known type, or inference tensors."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise StrictError(f"{what}: a tensor is on {tensor.device}, and gloo stands in for the GPUs")
        if getattr(tensor, "on_host", False):  # see `tests.strict.stand_in`
            raise StrictError(
                f"{what}: a tensor is on the host, where NCCL cannot reach it: move it to the device first"
            )
        if tensor.layout != torch.strided:
            raise StrictError(f"{what}: a tensor is {tensor.layout}, and NCCL takes dense ones only")
        if tensor.is_inference():
            raise StrictError(f"{what}: a tensor was made in inference mode, and no collective may write to it later")
        if not tensor.is_contiguous():
            raise StrictError(f"{what}: a tensor is not contiguous (strides {tensor.stride()})")
        if tensor.dtype not in TYPES:
            raise StrictError(f"{what}: NCCL has no type for {tensor.dtype}")


def check_reduction(reduction: Op, tensors: Sequence[Tensor], what: str) -> str:
    """Return its name; refuse what NCCL cannot reduce, or reduces to something else."""
    name = next((name for op, name in REDUCTIONS.items() if reduction == op), None)
    if name is None:
        raise StrictError(f"{what}: NCCL has no reduction {reduction}")
    if name in ("SUM", "PRODUCT") and any(tensor.dtype == torch.bool for tensor in tensors):
        raise StrictError(f"{what}: NCCL's {name} of bools is an OR or an AND: count in int32")
    return name


def check_equal(pieces: Sequence[Tensor], whole: Tensor, size: int, what: str) -> None:
    """Refuse a list that has not one tensor per rank, each like the other side's."""
    if len(pieces) != size:
        raise StrictError(f"{what}: {len(pieces)} tensors for {size} ranks")
    for piece in pieces:
        if piece.shape != whole.shape or piece.dtype != whole.dtype:
            raise StrictError(f"{what}: unequal tensors, {described(piece)} and {described(whole)}")


def check_multiple(large: Tensor, small: Tensor, size: int, what: str) -> None:
    """Refuse a tensor that is not as large as one of each rank together."""
    if large.numel() != size * small.numel() or large.dtype != small.dtype:
        raise StrictError(
            f"{what}: unequal tensors, {described(large)} and, from each of {size} ranks, {described(small)}"
        )


def check_splits(rows: Tensor, what: str) -> None:
    """Refuse an all-to-all in which a rank sends another number of rows than its peer expects.

    Args:
        rows: `[W, 2 W]`, for each rank what it receives from each and what it sends to each.
        what: Names the operation.
    """
    receive, send = rows.chunk(2, dim=1)
    for sender, receiver in (send != receive.T).nonzero().tolist():
        raise StrictError(
            f"{what}: rank {sender} sends {int(send[sender, receiver])} rows to rank {receiver}, "
            f"which expects {int(receive[receiver, sender])}"
        )


def refuse_objects() -> None:
    """Refuse what torch calls for its object collectives: pickles go through the GPU, and the host waits for each."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == dist.distributed_c10d.__file__ and "object" in frame.f_code.co_name:
            raise StrictError(f"{frame.f_code.co_name} on the data group: pickled values belong on the control group")
        frame = frame.f_back
