"""All that a process group can do, on two ranks: refusals.py compares the strict group with gloo."""

import torch
import torch.distributed as dist

from tests.strict import StrictGroup
from tests.strict.stand_in import DEVICE


def rank():
    return dist.get_rank()


def numbers(*shape, dtype=torch.float32):
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).view(shape) * (1 + rank())


def every_operation(group):
    """Yield, with its name, what each gives on this rank."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
            dist.all_reduce(tensor := numbers(3, 2, dtype=dtype), op, group=group)
            yield f"all_reduce {dtype} {op}", tensor
    dist.all_reduce(tensor := numbers(), group=group)
    yield "all_reduce of a scalar", tensor
    dist.all_reduce(tensor := numbers(0), group=group)
    yield "all_reduce of nothing", tensor
    for root in range(2):
        dist.broadcast(tensor := numbers(3), root, group=group)
        yield "broadcast", tensor
        dist.reduce(tensor := numbers(3), root, group=group)
        yield "reduce", tensor if rank() == root else torch.zeros(0)
        gathered = torch.zeros(2, 3)
        dist.gather(numbers(3), list(gathered) if rank() == root else None, root, group=group)
        yield "gather", gathered
        dist.scatter(tensor := torch.zeros(3), list(numbers(2, 3)) if rank() == root else None, root, group=group)
        yield "scatter", tensor
    for dtype in (torch.bool, torch.float32):
        whole = torch.empty(2, 3, dtype=dtype)
        dist.all_gather(list(whole), numbers(3).to(dtype), group=group)
        yield "all_gather", whole
        dist.all_gather_into_tensor(whole := torch.empty(6, dtype=dtype), numbers(3).to(dtype), group=group)
        yield "all_gather_into_tensor", whole
    whole = numbers(6)
    dist.all_gather_into_tensor(whole, whole.chunk(2)[rank()], group=group)
    yield "all_gather_into_tensor in place", whole
    dist.reduce_scatter(tensor := torch.empty(3), list(numbers(2, 3)), group=group)
    yield "reduce_scatter", tensor
    dist.reduce_scatter_tensor(tensor := torch.empty(3), numbers(6), group=group)
    yield "reduce_scatter_tensor", tensor
    dist.all_to_all_single(tensor := torch.empty(4), numbers(4), group=group)
    yield "all_to_all_single", tensor
    send, receive = ([3, 0], [3, 2]) if rank() == 0 else ([2, 1], [0, 1])
    dist.all_to_all_single(tensor := torch.empty(sum(receive), 2), numbers(3, 2), receive, send, group=group)
    yield "all_to_all_single with splits", tensor
    yield from (coalesced if isinstance(group, StrictGroup) else one_by_one)(group)
    dist.barrier(group=group)


def coalesced(group):
    """Several at once, in the ways that torch has."""
    with dist.distributed_c10d._coalescing_manager(group, async_ops=True) as works:
        for tensor in (tensors := [numbers(3), numbers(4)]):
            dist.all_reduce(tensor, group=group)
    works.wait()
    yield "all_reduce, coalesced", torch.cat(tensors)
    with dist.distributed_c10d._coalescing_manager(group, DEVICE):
        outputs = [numbers(3), numbers(6)]
        group.broadcast([outputs[0]], broadcast_from(0))
        group.all_gather_single(outputs[1], numbers(3))
    yield "all_gather_single, coalesced", torch.cat(outputs)
    outputs = [torch.empty(3), torch.empty(2)]
    group.reduce_scatter_tensor_coalesced(outputs, [numbers(6), numbers(4)]).wait()
    yield "reduce_scatter_tensor, coalesced", torch.cat(outputs)
    lists = [[torch.empty(3), torch.empty(2)] for _ in range(2)]
    group.allgather_coalesced(lists, [numbers(3), numbers(2)]).wait()
    yield "all_gather, coalesced", torch.cat([tensor for each in lists for tensor in each])


def one_by_one(group):
    """The same as `coalesced`."""
    for tensor in (tensors := [numbers(3), numbers(4)]):
        dist.all_reduce(tensor, group=group)
    yield "all_reduce, coalesced", torch.cat(tensors)
    dist.broadcast(first := numbers(3), 0, group=group)
    dist.all_gather_into_tensor(second := torch.empty(6), numbers(3), group=group)
    yield "all_gather_single, coalesced", torch.cat([first, second])
    for tensor, whole in zip(outputs := [torch.empty(3), torch.empty(2)], [numbers(6), numbers(4)], strict=True):
        dist.reduce_scatter_tensor(tensor, whole, group=group)
    yield "reduce_scatter_tensor, coalesced", torch.cat(outputs)
    lists = [[torch.empty(3), torch.empty(2)] for _ in range(2)]
    for each, tensor in zip(zip(*lists, strict=True), [numbers(3), numbers(2)], strict=True):
        dist.all_gather(list(each), tensor, group=group)
    yield "all_gather, coalesced", torch.cat([tensor for each in lists for tensor in each])


def broadcast_from(rank):
    opts = dist.BroadcastOptions()
    opts.rootRank, opts.rootTensor = rank, 0
    return opts
