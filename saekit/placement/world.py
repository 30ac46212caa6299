"""The processes that train together, and what every placement with several ranks needs."""

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

CONNECT_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for each other when they meet."""
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""How long a collective on tensors may take."""
CONTROL_TIMEOUT = timedelta(days=1)
"""How long ranks wait for each other in exchanges of small values: one may be tokenizing a large data set."""


@dataclass(frozen=True)
class World:
    """All ranks of a run, as seen from this one."""

    rank: int
    """This rank over all machines. It chooses the slice of the data."""
    size: int
    """The number of ranks."""
    device: torch.device
    """This rank's device, chosen by its rank on this machine."""
    control: dist.ProcessGroup
    """The group for small plain values. It uses TCP, so no GPU is involved."""
    failures: FailureWatch
    """Watches for failed ranks; it also works when a rank is gone."""
    accelerator: Accelerator

    def lengthen_timeouts(self) -> None:
        """Lengthen the timeouts of all existing groups, which start with 10 or 30 minutes.

        The libraries that make the groups do not take all timeouts: accelerate drops a timeout that equals its own
        default, and DeepSpeed copies the group of all ranks without its timeout.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Set timeout is now only supported", UserWarning)
            for group in list(c10d._world.pg_map):
                c10d._set_pg_timeout(CONTROL_TIMEOUT if group == self.control else COLLECTIVE_TIMEOUT, group)


def start_world(zero: DeepSpeedPlugin | None = None) -> World:
    """Join the processes that a launcher started.

    They use NCCL, or gloo on machines without a GPU or if the launch file says CPU. Collective.

    Args:
        zero: DeepSpeed's plugin, if DeepSpeed shards the SAEs.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    backend = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=CONNECT_TIMEOUT)
    # With `cpu=True`, accelerate would ignore the plugin.
    accelerator = Accelerator(
        cpu=on_cpu and zero is None, mixed_precision="no", deepspeed_plugin=zero, kwargs_handlers=[backend]
    )
    control = dist.new_group(backend="gloo", timeout=CONNECT_TIMEOUT)
    start = [uuid.uuid4().hex]
    dist.broadcast_object_list(start, src=0, group=control)
    failures = FailureWatch(connect_to_store(), start[0], accelerator.num_processes)
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device  # not cpu:0
    world = World(accelerator.process_index, accelerator.num_processes, device, control, failures, accelerator)
    world.lengthen_timeouts()
    return world


def connect_to_store() -> Any:
    """Open a second connection to the store where ranks meet: the group's is busy while a collective waits."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]


class Ranked(Placement):
    """Sums tensors and exchanges small values over all ranks. Subclasses add how parameters are held."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.device = world.device
        self.rank = world.rank
        self.world_size = world.size

    def leader(self, hookpoint: str) -> int:
        """Return the rank that leads a layer. By default, layers are dealt to the ranks in turn."""
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
        """Sum counts in one call, as int32, since a step has fewer than 2³¹ tokens."""
        together = counts.to(torch.int32)
        dist.all_reduce(together)
        return together

    def gather(self, value: Any) -> list[Any]:
        """Exchange values over TCP. They are pickled, but only between the processes of one run."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.world.control)
        return values

    def watch(self) -> None:
        """Start to poll the launcher's store for failed ranks."""
        self.world.failures.begin()

    def closing(self, error: BaseException) -> None:
        """Start the timer that ends this process if closing takes too long."""
        self.world.failures.closing(error)

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """Exchange the numbers over TCP in one round, since their size is known."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        everywhere = mine.new_empty(self.world_size, len(mine))
        dist.all_gather(list(everywhere), mine, group=self.world.control)
        return everywhere.tolist()

    def first_to_fail(self) -> bool:
        """Return whether this rank's failure is the first in the launcher's store."""
        return self.world.failures.claim()

    def close(self) -> None:
        """Wait for the other ranks and end the process groups."""
        self.world.failures.leave()
        # If a rank ended without waiting, gloo would abort the ranks that still work.
        self.gather(None)
        self.world.failures.end()
        dist.destroy_process_group()
        # This drops the last reference to the groups, which ends their threads. A thread that still holds a tensor of
        # the last collective at Python's exit would abort the process.
        del self.world
