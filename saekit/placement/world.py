"""The processes that train together, and what any placement over several of them needs."""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from saekit.placement.base import Placement
from saekit.placement.failure import FailureWatch

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

CONNECTS = timedelta(minutes=10)
"""Time for which ranks wait for one another when they meet: one that is not there by then does not come."""
AT_WORK = timedelta(hours=1)
"""Time that a collective of the training may take."""
PATIENCE = timedelta(days=1)
"""Time for which ranks wait for one another outside the training: one of them may be tokenizing a large data set."""


@dataclass(frozen=True)
class World:
    """All ranks of a run, and where this one stands."""

    rank: int
    """Over all machines: chooses the slice of the data."""
    size: int
    device: torch.device
    """Chosen by the rank on this machine, not by the one over all machines."""
    control: dist.ProcessGroup
    """For small plain values, over TCP, so that no GPU is involved."""
    failures: FailureWatch
    """Knows of ranks that have failed; it still does when a rank is gone."""
    accelerator: Accelerator

    def lengthen_timeouts(self) -> None:
        """Let collectives of all groups that there are now take their time: groups start with 10 or 30 minutes.

        The libraries that make them can be told otherwise in part only: accelerate passes nothing on that equals its
        own default, and DeepSpeed copies the group of all ranks without its timeout.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Set timeout is now only supported", UserWarning)
            for group in list(c10d._world.pg_map):
                c10d._set_pg_timeout(PATIENCE if group == self.control else AT_WORK, group)


def start_world(zero: DeepSpeedPlugin | None = None) -> World:
    """Join the processes that a launcher started.

    On machines without a GPU (or under a launch file that hides it) they speak gloo, else NCCL.

    Args:
        zero: How DeepSpeed is to shard, if it is.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    backend = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=CONNECTS)
    # Told that it is on a CPU, accelerate would not look at the plugin.
    accelerator = Accelerator(
        cpu=on_cpu and zero is None, mixed_precision="no", deepspeed_plugin=zero, kwargs_handlers=[backend]
    )
    control = dist.new_group(backend="gloo", timeout=CONNECTS)
    start = [uuid.uuid4().hex]
    dist.broadcast_object_list(start, src=0, group=control)
    failures = FailureWatch(connect_to_store(), start[0], accelerator.num_processes)
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device  # not cpu:0
    world = World(accelerator.process_index, accelerator.num_processes, device, control, failures, accelerator)
    world.lengthen_timeouts()
    return world


def connect_to_store() -> Any:
    """Return a connection of our own to the store where ranks meet: the group's is busy while a collective waits."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]


class Ranked(Placement):
    """Sums and small values over all ranks; the other half of a placement is how it holds parameters."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.device = world.device
        self.rank = world.rank
        self.world_size = world.size

    def leader(self, hookpoint: str) -> int:
        """Return the rank that leads a layer: layers that all ranks have a part in are shared out among them."""
        return self.layers().index(hookpoint) % self.world_size

    def leads(self, hookpoint: str) -> bool:
        """Tell whether this rank is the leader."""
        return self.leader(hookpoint) == self.rank

    def sum(self, value: Tensor) -> Tensor:
        """All-reduce a copy."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    def share(self, counts: Tensor) -> Tensor:
        """Sum counts in one call, as int32: a step has fewer than 2³¹ tokens."""
        together = counts.to(torch.int32)
        dist.all_reduce(together)
        return together

    def gather(self, value: Any) -> list[Any]:
        """Exchange values over TCP, pickled between processes of one run."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.world.control)
        return values

    def watch(self) -> None:
        """Ask the launcher's store twice a second."""
        self.world.failures.begin()

    def closing(self, error: BaseException) -> None:
        """Give what is closed some seconds."""
        self.world.failures.closing(error)

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Exchange them over TCP in one round, since their size is known."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        everywhere = mine.new_empty(self.world_size, len(mine))
        dist.all_gather(list(everywhere), mine, group=self.world.control)
        return everywhere.tolist()

    def first_to_fail(self) -> bool:
        """Ask the launcher's store, which counts."""
        return self.world.failures.claim()

    def close(self) -> None:
        """Wait for the others and end the process groups."""
        self.world.failures.leave()
        # A rank that simply ends tears its connections out of those who are still at work: gloo aborts them.
        self.gather(None)
        self.world.failures.end()
        dist.destroy_process_group()
        # The last reference to the groups: their threads end here. One that still holds a tensor of the last collective
        # while Python is being taken down would abort the process.
        del self.world
