"""The process group: its operations."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor

from tests.strict.checks import (
    StrictError,
    check_equal,
    check_multiple,
    check_reduction,
    described,
)
from tests.strict.operation import Operation, Pending, Run
from tests.strict.ordered import Ordered


class StrictGroup(Ordered):
    """Ranks that exchange tensors of the device; torch makes it, as it makes NCCL's."""

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Pending:
        """Reduce in place."""
        given, opts = opts, dist.AllreduceOptions()
        if given is not None:  # perhaps of the coalesced kind
            opts.reduceOp = given.reduceOp

        def run(sent: list[Tensor], arrived: list[Tensor]) -> dist.Work:
            arrived[0].copy_(sent[0])
            return self._gloo.allreduce(arrived, opts)

        def one(tensor: Tensor) -> Operation:
            reduction = check_reduction(opts.reduceOp, [tensor], "all_reduce")
            return Operation(f"all_reduce {reduction} of {described(tensor)}", [tensor], [tensor], run)

        return self._begin_each([one(tensor) for tensor in tensors])

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: Any) -> Pending:
        """Reduce in place on the root; the others' tensors stay as they are."""
        reduction = check_reduction(opts.reduceOp, tensors, "reduce")
        text = f"reduce {reduction} to rank {opts.rootRank} of {described(*tensors)}"

        def run(sent: list[Tensor], arrived: list[Tensor]) -> dist.Work:
            return self._gloo.reduce([arrived[0].copy_(sent[0])] if arrived else sent, opts)

        return self._begin(Operation(text, tensors, tensors if opts.rootRank == self.rank() else [], run))

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Pending:
        """Send the root's tensor."""
        text = f"broadcast from rank {opts.rootRank} of {described(*tensors)}"
        inputs, outputs = (tensors, []) if opts.rootRank == self.rank() else ([], tensors)
        return self._begin(
            Operation(text, inputs, outputs, lambda sent, arrived: self._gloo.broadcast(sent or arrived, opts))
        )

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Pending:
        """Gather into a list, as large on each rank."""
        return self._begin_each(
            [self._gathered(each, tensor) for each, tensor in zip(outputs, inputs, strict=True)],
        )

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Pending:
        """Gather several, into a list for each rank."""
        return self._begin_each(
            [
                self._gathered(list(each), tensor)
                for each, tensor in zip(zip(*outputs, strict=True), inputs, strict=True)
            ]
        )

    def _gathered(self, outputs: list[Tensor], tensor: Tensor) -> Operation:
        text = f"all_gather of {described(tensor)}"
        check_equal(outputs, tensor, self.size(), text)
        return Operation(text, [tensor], outputs, lambda sent, arrived: self._gloo.allgather([arrived], sent))

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Pending:
        """Gather into one tensor."""
        return self.all_gather_single_coalesced([output], [tensor])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        """Gather several."""

        def one(output: Tensor, tensor: Tensor) -> Operation:
            text = f"all_gather_into_tensor of {described(tensor)}"
            check_multiple(output, tensor, self.size(), text)
            return Operation(text, [tensor], [output], lambda sent, arrived: self._gather_flat(arrived[0], sent[0]))

        return self._begin_each([one(output, tensor) for output, tensor in zip(outputs, inputs, strict=True)])

    def _gather_flat(self, arrived: Tensor, sent: Tensor) -> dist.Work:
        return self._gloo.allgather([parts(arrived, self.size())], [sent.view(-1)])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Pending:
        """Reduce a list of which each rank gets its own."""
        opts = opts or dist.ReduceScatterOptions()

        def one(output: Tensor, pieces: list[Tensor]) -> Operation:
            reduction = check_reduction(opts.reduceOp, pieces, "reduce_scatter")
            text = f"reduce_scatter {reduction} of {described(output)}"
            check_equal(pieces, output, self.size(), text)
            return Operation(text, pieces, [output], self._reduce_each(opts))

        return self._begin_each([one(output, list(pieces)) for output, pieces in zip(outputs, inputs, strict=True)])

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Pending:
        """Reduce one tensor of which each rank gets its part."""
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Pending:
        """Reduce several."""
        opts = opts or dist.ReduceScatterOptions()

        def one(output: Tensor, tensor: Tensor) -> Operation:
            reduction = check_reduction(opts.reduceOp, [tensor], "reduce_scatter_tensor")
            text = f"reduce_scatter_tensor {reduction} of {described(output)}"
            check_multiple(tensor, output, self.size(), text)
            return Operation(text, [tensor], [output], self._reduce_each(opts))

        return self._begin_each([one(output, tensor) for output, tensor in zip(outputs, inputs, strict=True)])

    def _reduce_each(self, opts: Any) -> Run:
        def run(sent: list[Tensor], arrived: list[Tensor]) -> dist.Work:
            pieces = parts(sent[0], self.size()) if len(sent) == 1 < self.size() else sent
            return self._gloo.reduce_scatter([arrived[0].view(-1)], [[each.view(-1) for each in pieces]], opts)

        return run

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Pending:
        """Gather into a list on the root."""
        text = f"gather to rank {opts.rootRank} of {described(*inputs)}"
        arrives = outputs[0] if opts.rootRank == self.rank() else []
        if opts.rootRank == self.rank():
            check_equal(arrives, inputs[0], self.size(), text)

        def run(sent: list[Tensor], arrived: list[Tensor]) -> dist.Work:
            return self._gloo.gather([arrived] if arrived else [], sent, opts)

        return self._begin(Operation(text, inputs, arrives, run))

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Pending:
        """Send each rank its tensor of the root's list."""
        text = f"scatter from rank {opts.rootRank} of {described(*outputs)}"
        leaves = inputs[0] if opts.rootRank == self.rank() else []
        if opts.rootRank == self.rank():
            check_equal(leaves, outputs[0], self.size(), text)

        def run(sent: list[Tensor], arrived: list[Tensor]) -> dist.Work:
            return self._gloo.scatter(arrived, [sent] if sent else [], opts)

        return self._begin(Operation(text, leaves, outputs, run))

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, receive: Sequence[int], send: Sequence[int], opts: Any = None
    ) -> Pending:
        """Send each rank some of the rows; shapes may differ, what one sends and the other expects may not."""
        text = f"all_to_all_single of {str(tensor.dtype).removeprefix('torch.')}"
        receives, sends = (self._split(*each, text) for each in ((output, receive), (tensor, send)))

        def run(sent: list[Tensor], arrived: list[Tensor]) -> dist.Work:
            return self._gloo.alltoall_base(arrived[0], sent[0], receives, sends)

        return self._begin(Operation(text, [tensor], [output], run, (receives, sends)))

    def _split(self, tensor: Tensor, rows: Sequence[int], what: str) -> list[int]:
        rows = list(rows) or [len(tensor) // self.size()] * self.size()
        if len(rows) != self.size() or sum(rows) != len(tensor):
            raise StrictError(f"{what}: {len(tensor)} rows are to be split as {rows} among {self.size()} ranks")
        return rows

    def barrier(self, opts: Any = None) -> Pending:
        """Wait for all ranks."""
        return self._begin(Operation("barrier", [], [], lambda sent, arrived: self._gloo.barrier()))

    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Pending:
        """Send to one rank: nobody else is asked what it does."""
        return self._point_to_point("send to", tensors, rank, tag)

    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Pending:
        """Receive from one rank."""
        return self._point_to_point("receive from", tensors, rank, tag)

    def _point_to_point(self, name: str, tensors: list[Tensor], rank: int, tag: int) -> NoReturn:
        # Unused by saekit and DeepSpeed's ZeRO. Its two sides differ, so the comparison over ranks has no rule for it.
        raise StrictError(f"{name} rank {rank}: the strict group has no point-to-point operations")

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> NoReturn:
        """Refuse."""
        raise StrictError("NCCL has no receive from any source")

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> NoReturn:
        """Refuse: gloo does not support it."""
        raise StrictError("all_to_all of lists is not supported by gloo: use all_to_all_single")

    # Names of older torch.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def parts(tensor: Tensor, count: int) -> list[Tensor]:
    """Equal parts of a tensor, flat."""
    return list(tensor.view(-1).tensor_split(count))
