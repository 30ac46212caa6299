"""Checks between ranks before a run, for `saekit doctor --launch`. Functions that take a placement are collective."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from saekit.machine import library_versions
from saekit.placement.base import Placement
from saekit.placement.network import rates_of
from saekit.placement.world import Ranked, connect_to_store

VISIBLE_WITHIN = 5.0
"""Seconds within which a file from another machine must be visible: network file systems cache missing files."""
CLOCK_ROUNDS = 3
"""The number of times that clocks are compared; the smallest difference counts."""


@dataclass(frozen=True)
class About:
    """A rank's description of itself."""

    rank: int
    host: str
    device: str
    """Its kind and name: `cuda NVIDIA H100`, `cpu`."""
    device_id: str | None
    """The GPU's unique id; None for a CPU."""
    backend: str
    """The backend of the group that exchanges tensors."""
    control: str
    """The backend of the group that exchanges small values."""
    threads: int
    """The number of torch's threads."""
    cores: frozenset[int]
    """The CPU cores that it may use; empty if the system does not say."""
    versions: Mapping[str, str]
    """The versions of libraries, by name."""


@dataclass(frozen=True)
class Seen:
    """What a rank sees of a folder."""

    path: str
    """The folder's absolute path on this rank."""
    shared: bool
    """Whether it is the same folder as rank 0's."""
    refused: str | None
    """Why the rank cannot write there; None if it can."""


def agent_store() -> Any | None:
    """Return the launcher's store, which exists before ranks meet; None if rank 0 makes one when they meet."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return connect_to_store()


def store_of(placement: Placement) -> Any | None:
    """Return the store that all ranks share after they have met; None for one process."""
    return placement.world.failures.store if isinstance(placement, Ranked) else None


def introduce(placement: Placement) -> list[About]:
    """Return the descriptions of all ranks, in rank order. Collective."""
    device = placement.device
    versions, device_id, name = library_versions(), None, "cpu"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"cuda {properties.name}"
        device_id = str(getattr(properties, "uuid", device.index))
        versions |= {
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, cast("Any", torch.cuda.nccl).version())),
        }
    return placement.gather(
        About(
            rank=placement.rank,
            host=socket.gethostname(),
            device=name,
            device_id=device_id,
            backend=dist.get_backend(),
            control=dist.get_backend(placement.world.control if isinstance(placement, Ranked) else None),
            threads=torch.get_num_threads(),
            cores=frozenset(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()),
            versions=versions,
        )
    )


def collectives(placement: Placement) -> dict[str, Callable[[], str | None]]:
    """Return a trial of each collective that saekit or DeepSpeed uses, by name.

    A trial is collective and returns what is wrong with the result, or None. The last trial, `all_gather_object`, uses
    the group for small values, the others the group for tensors.
    """
    rank, ranks, device = placement.rank, placement.world_size, placement.device

    def vector(value: float, dtype: torch.dtype = torch.float32, size: int = 5) -> torch.Tensor:
        return torch.full((size,), value, dtype=dtype, device=device)

    def all_reduce() -> str | None:
        for dtype in (torch.float32, torch.float64, torch.int32, torch.int64):
            total = vector(rank + 1, dtype)
            dist.all_reduce(total)
            if wrong := _compare(total, vector(ranks * (ranks + 1) // 2, dtype)):
                return f"{str(dtype).removeprefix('torch.')}: {wrong}"
        return None

    def broadcast() -> str | None:
        sent = vector(rank, torch.float64)
        dist.broadcast(sent, src=ranks - 1)
        return _compare(sent, vector(ranks - 1, torch.float64))

    def all_gather() -> str | None:
        together = vector(0, torch.bool, 5 * ranks).view(ranks, 5)
        dist.all_gather(list(together), vector(rank % 2, torch.bool))
        return _compare(together[:, 0], torch.arange(ranks, device=device) % 2 == 1)

    def gather() -> str | None:
        together = vector(0, size=5 * ranks).view(ranks, 5)
        dist.gather(vector(rank), list(together) if rank == 0 else None, dst=0)
        return None if rank else _compare(together[:, 4], torch.arange(ranks, device=device).float())

    def all_gather_into_tensor() -> str | None:
        together = vector(0, size=5 * ranks)
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(together, vector(rank))  # torch 2.13's name
        return _compare(together.view(ranks, 5)[:, 4], torch.arange(ranks, device=device).float())

    def reduce_scatter_tensor() -> str | None:
        mine = vector(0)
        parts = torch.arange(ranks, device=device).repeat_interleave(5).float()
        getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(mine, parts)
        return _compare(mine, vector(rank * ranks))

    def all_to_all_single() -> str | None:
        """Send r rows to rank r, so none to rank 0."""
        send, receive = list(range(ranks)), [rank] * ranks
        arrived = vector(0, torch.bfloat16, rank * ranks)
        dist.all_to_all_single(arrived, vector(rank, torch.bfloat16, sum(send)), receive, send)
        return _compare(arrived, torch.arange(ranks, device=device).repeat_interleave(rank).bfloat16())

    def all_gather_object() -> str | None:
        said = placement.gather({"rank": rank})
        return None if said == [{"rank": each} for each in range(ranks)] else f"got {said}"

    trials = (all_reduce, broadcast, all_gather, gather, all_gather_into_tensor, reduce_scatter_tensor)
    return {trial.__name__: trial for trial in (*trials, all_to_all_single, all_gather_object)}


def _compare(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    if torch.equal(found, expected):
        return None
    return f"got {found.flatten()[:4].tolist()}, expected {expected.flatten()[:4].tolist()}"


def speeds(placement: Placement) -> dict[str, float]:
    """Measure the bytes per second that a rank sends, by collective; empty for one rank. Collective."""
    if placement.world_size < 2:
        return {}
    all_reduce, all_to_all = rates_of(placement.rank, placement.world_size, placement.device)
    return {"all_reduce": all_reduce, "all_to_all_single": all_to_all}


def look_at(folder: Path, placement: Placement) -> list[Seen]:
    """Find out which ranks see rank 0's folder under their own path for it, and which can write there. Collective."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    token = placement.gather(uuid.uuid4().hex)[0]
    own = there / f".saekit-doctor-{token}-{placement.rank}"
    refused = None
    try:
        own.write_text(token, encoding="utf-8")
    except OSError as error:
        refused = error.strerror or type(error).__name__
    placement.gather(None)  # rank 0 has written its file
    mark, until, shared = there / f".saekit-doctor-{token}-0", time.monotonic() + VISIBLE_WITHIN, False
    while not shared and time.monotonic() < until:
        with suppress(OSError):  # the file is not visible, or not yet
            shared = mark.read_text(encoding="utf-8") == token
        time.sleep(0 if shared else 0.2)
    seen = placement.gather(Seen(str(folder.absolute()), shared, refused))
    with suppress(OSError):  # the file was not written
        own.unlink()
    return seen


def clocks(placement: Placement) -> list[float]:
    """Measure by how many seconds each rank's clock is ahead of rank 0's. Collective.

    The error is at most the time that a message takes.
    """
    rounds = []
    for _ in range(CLOCK_ROUNDS):
        placement.gather(None)  # all ranks continue at about the same time
        now = placement.gather(time.time())
        rounds.append([each - now[0] for each in now])
    return [min(of_rank, key=abs) for of_rank in zip(*rounds, strict=True)]
