"""Run on two ranks by test_strict.py: do all that a strict group refuses, and all that it does; write down what came.

The first argument is the file; each rank adds its number to it.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from tests.placement.operations import every_operation, numbers, rank
from tests.strict import StrictError, ordered
from tests.strict.stand_in import DEVICE


def inference():
    with torch.inference_mode():
        tensor = torch.ones(3)
    dist.all_reduce(tensor)


def sparse():
    dist.broadcast(torch.eye(3).to_sparse(), 0)


def strided():
    dist.all_reduce(torch.ones(3, 4).T)


def meta():
    dist.all_reduce(torch.ones(3, device="meta"))


def unknown_type():
    dist.broadcast(torch.ones(3, dtype=torch.int16), 0)


def bitwise():
    dist.all_reduce(torch.ones(3, dtype=torch.int32), dist.ReduceOp.BXOR)


def sum_of_bools():
    dist.all_reduce(torch.ones(3, dtype=torch.bool))


def gathered_object():
    dist.all_gather_object([None, None], "pickled")


def broadcast_object():
    dist.broadcast_object_list(["pickled"], 0)


def unequal_in_a_list():
    dist.all_gather([torch.ones(3), torch.ones(4)], torch.ones(3))


def too_few():
    dist.reduce_scatter(torch.ones(3), [torch.ones(3)])


def no_multiple():
    dist.all_gather_into_tensor(torch.ones(7), torch.ones(3))


def no_split():
    dist.all_to_all_single(torch.ones(4), torch.ones(4), [2, 2], [1, 2])


def lists_to_all():
    dist.all_to_all(list(torch.ones(2, 1)), list(torch.ones(2, 1)))


def sent():
    dist.send(torch.ones(3), 1 - rank())


def received():
    dist.recv(torch.ones(3), 1 - rank())


def any_source():
    dist.recv(torch.ones(3))


def made_on_host():
    dist.all_reduce(torch.ones(3, device="cpu"))


def moved_to_host():
    dist.all_gather_into_tensor(torch.ones(6), torch.ones(3).cpu())


def computed_on_host():
    first, *_ = (torch.from_numpy(numpy.ones(6)) * 2 + 1).chunk(2)
    dist.broadcast(first, 0)


def parameter_on_host():
    dist.broadcast(torch.nn.Linear(1, 3, device="cpu").weight.data, 0)


def changed_input():
    tensor, output = torch.ones(3), torch.ones(6)
    work = dist.all_gather_into_tensor(output, tensor, async_op=True)
    tensor += 1
    work.wait()


def written_output():
    tensor = torch.ones(3)
    work = dist.all_reduce(tensor, async_op=True)
    tensor.zero_()
    work.wait()


def other_operation():
    if rank() == 0:
        dist.all_reduce(torch.ones(3))
    else:
        dist.broadcast(torch.ones(3), 0)


def other_shape():
    dist.all_reduce(torch.ones(3 + rank()))


def other_type():
    dist.all_reduce(torch.ones(3, dtype=(torch.float32, torch.int32)[rank()]))


def other_root():
    dist.broadcast(torch.ones(3), rank())


def other_reduction():
    dist.all_reduce(torch.ones(3), (dist.ReduceOp.SUM, dist.ReduceOp.MAX)[rank()])


def other_order():
    works = [dist.all_reduce(torch.ones(3 + (turn + rank()) % 2), async_op=True) for turn in range(2)]
    try:
        works[1].wait()
    finally:
        for work in works:
            with suppress(StrictError, IndexError):  # the second is different as well
                work.wait()


def other_splits():
    rows = [[1, 1], [2, 2]][rank()]
    dist.all_to_all_single(torch.ones(2), torch.ones(sum(rows)), [1, 1], rows)


def alone():
    group = dist.new_group(backend="strict", timeout=timedelta(seconds=1))
    if rank() == 0:
        dist.all_reduce(torch.ones(3), group=group)


def unclaimed():
    group = dist.new_group(backend="strict")
    dist.all_reduce(torch.ones(3), group=group, async_op=True)
    dist.destroy_process_group(group)


THREE = "all_reduce SUM of float32 [3] (refusals.py:{})"
REFUSALS = {
    inference: "all_reduce SUM of float32 [3]: a tensor was made in inference mode",
    sparse: "a tensor is torch.sparse_coo, and NCCL takes dense ones only",
    strided: "a tensor is not contiguous (strides (1, 4))",
    meta: "a tensor is on meta",
    unknown_type: "NCCL has no type for torch.int16",
    bitwise: "all_reduce: NCCL has no reduction",
    sum_of_bools: "NCCL's SUM of bools is an OR or an AND: count in int32",
    gathered_object: "all_gather_object on the data group: pickled values belong on the control group",
    broadcast_object: "broadcast_object_list on the data group",
    unequal_in_a_list: "all_gather of float32 [3]: unequal tensors, float32 [4] and float32 [3]",
    too_few: "1 tensors for 2 ranks",
    no_multiple: "unequal tensors, float32 [7] and, from each of 2 ranks, float32 [3]",
    no_split: "4 rows are to be split as [1, 2] among 2 ranks",
    lists_to_all: "all_to_all of lists is not supported by gloo",
    sent: "the strict group has no point-to-point operations",
    received: "the strict group has no point-to-point operations",
    any_source: "NCCL has no receive from any source",
    made_on_host: "all_reduce SUM of float32 [3]: a tensor is on the host, where NCCL cannot reach it",
    moved_to_host: "all_gather_into_tensor of float32 [3]: a tensor is on the host",
    computed_on_host: "broadcast from rank 0 of float64 [3]: a tensor is on the host",
    parameter_on_host: "broadcast from rank 0 of float32 [3, 1]: a tensor is on the host",
    changed_input: "an input was changed before wait()",
    written_output: "an output was written to before wait()",
    other_operation: f"rank 0 calls {THREE}; rank 1 calls broadcast from rank 0",
    other_shape: f"rank 0 calls {THREE}; rank 1 calls all_reduce SUM of float32 [4]",
    other_type: "rank 1 calls all_reduce SUM of int32 [3]",
    other_root: "rank 1 calls broadcast from rank 1 of float32 [3]",
    other_reduction: "rank 1 calls all_reduce MAX of float32 [3]",
    other_order: f"rank 0 calls {THREE}; rank 1 calls all_reduce SUM of float32 [4]",
    other_splits: "rank 1 sends 2 rows to rank 0, which expects 1",
    alone: "another rank has not come to it within 1 s",
    unclaimed: f"operation 1, {THREE}: nobody waited for it",
}


def late():
    """What outputs hold before `wait()`, and after it, where works are waited for from the last to the first."""
    tensors = [numbers(2), numbers(2, dtype=torch.int32), numbers(2).bool(), numbers(2).bfloat16()]
    outputs = [torch.empty(4, dtype=tensor.dtype) for tensor in tensors]
    works = [dist.all_gather_into_tensor(*each, async_op=True) for each in zip(outputs, tensors, strict=True)]
    before = [output.tolist() for output in outputs]
    assert not any(work.is_completed() for work in works)
    for work in reversed(works):
        work.wait()
    assert all(work.is_completed() for work in works)
    return before, [output.tolist() for output in outputs]


def on_device():
    """Whether what is on the device, or came to it, is taken, and where tensors say that they are."""
    host = torch.ones(3, device="cpu")
    moved, parameter = host.to(DEVICE), torch.nn.Parameter(torch.ones(3, device="cpu"))
    module = torch.nn.Linear(1, 3, device="cpu").to(DEVICE)
    taken = [moved, host.sum() + moved, torch.empty(3, device=moved.device).copy_(host), module.weight.data]
    for tensor in taken:
        dist.all_reduce(tensor)
    parameter.data = moved
    places = [host, moved, moved.cpu(), moved[1:], host[1:], parameter, host.to(moved), moved.to(torch.int32)]
    assert moved.to(DEVICE) is moved
    assert host.cpu() is host
    assert moved.cpu() is not moved
    return [str(each.device) for each in places]


def hangs_where_no_handler_runs():
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
        ordered.hang()
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.2)
    hangs = os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return hangs


def hangs_when_the_other_is_gone():
    """Whether a rank would hang, if it is asked to, where gloo says that the other has ended."""

    class Hangs(BaseException):
        pass

    def hang():
        raise Hangs

    ordered.hang = hang
    os.environ["STRICT_LOST"] = "hang"
    try:
        dist.all_reduce(torch.ones(3))
    except Hangs:
        return True
    return False


def main(file):
    torch.set_default_device(DEVICE)
    dist.init_process_group("gloo")
    me = rank()
    found = {"late": late(), "refused": {}, "places": on_device()}
    pairs = zip(every_operation(dist.group.WORLD), every_operation(dist.new_group(backend="gloo")), strict=True)
    found["operations"] = {name: strict.equal(plain) for (name, strict), (_, plain) in pairs}
    for case in REFUSALS:
        try:
            case()
            found["refused"][case.__name__] = None
        except StrictError as error:
            found["refused"][case.__name__] = str(error)
    if me == 0:
        found["hangs"] = [hangs_where_no_handler_runs(), hangs_when_the_other_is_gone()]
    with open(f"{file}{me}", "w", encoding="utf-8") as out:
        json.dump(found, out)
    os._exit(0)  # rank 1's end, which rank 0 is to notice, and rank 0's, which has nobody left to end with


if __name__ == "__main__":
    main(sys.argv[1])
