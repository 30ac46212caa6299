"""Measures the speed between ranks on this machine, with ranks that it starts: `python -m saekit.placement.network`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from saekit.errors import UserError

SIZE = 2**25
"""Bytes of the tensor that travels: about the gradient of a medium SAE, and more than a rank's share of the caches."""
ROUNDS = 8
"""The number of timed rounds. The fastest one counts, since other work on the machine only slows a round down."""
LIMIT = timedelta(seconds=60)
"""Timeout for the ranks to meet, and for each collective."""


def measure_network(ranks: int) -> tuple[float, float]:
    """Start ranks on this machine and measure how fast they exchange tensors.

    The ranks use NCCL if there is a GPU for each, otherwise gloo. On a CPU they share its cores, as ranks of
    `saekit train --launch` do.

    Args:
        ranks: The number of ranks, at least 2.

    Returns:
        Bytes per second that a rank sends in an all-reduce, and to one other rank while all ranks send.

    Raises:
        UserError: If the ranks cannot meet or cannot exchange tensors.
    """
    threads = str(max(1, torch.get_num_threads() // ranks))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryDirectory() as folder:
        meet, rates = Path(folder, "meet"), Path(folder, "rates")
        # Output goes to files: a rank with much output (NCCL_DEBUG=INFO) would fill a pipe and block.
        said = [Path(folder, f"said{rank}") for rank in range(ranks)]
        processes = [_start([meet, rates, ranks, rank], environment, log) for rank, log in enumerate(said)]
        until = time.monotonic() + 2 * LIMIT.total_seconds()
        try:
            while None in [process.poll() for process in processes] and not any(each.returncode for each in processes):
                if time.monotonic() > until:
                    seconds = 2 * LIMIT.total_seconds()
                    raise UserError(f"{ranks} ranks did not meet within {seconds:g} seconds: see saekit doctor")
                time.sleep(0.02)
            failed = [log for process, log in zip(processes, said, strict=True) if process.returncode]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed:
            errors = failed[0].read_text(encoding="utf-8", errors="replace").strip().splitlines()
            reason = errors[-1] if errors else "no error message"
            raise UserError(f"{ranks} ranks cannot exchange tensors ({reason}): see saekit doctor")
        all_reduce, point_to_point = json.loads(rates.read_text(encoding="utf-8"))
    return all_reduce, point_to_point


def _start(arguments: Sequence[object], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a rank that writes stderr to a file. If the rank fails, the file's last line is its error."""
    command = [sys.executable, "-m", __name__, *map(str, arguments)]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file
        )


def rates_of(rank: int, ranks: int, device: torch.device) -> tuple[float, float]:
    """Measure what `measure_network` returns. All ranks return the same. Collective."""
    tensor = torch.ones(SIZE // 4, device=device)
    arrived = torch.empty_like(tensor)

    def exchange() -> None:
        """Send to the next rank, as activations travel under layer-map."""
        after, before = (rank + 1) % ranks, (rank - 1) % ranks
        send = [tensor.numel() if other == after else 0 for other in range(ranks)]
        receive = [tensor.numel() if other == before else 0 for other in range(ranks)]
        dist.all_to_all_single(arrived, tensor, receive, send)

    reduced = 2 * SIZE * (ranks - 1) / ranks  # around a ring, as in `costs.Workload.all_reduce`
    return reduced / _fastest(lambda: dist.all_reduce(tensor), tensor), SIZE / _fastest(exchange, tensor)


def _fastest(work: Callable[[], object], on: Tensor) -> float:
    """Return the seconds of the fastest round; a round takes as long as its slowest rank."""
    rounds = []
    for _ in range(ROUNDS + 2):
        dist.barrier()
        start = time.perf_counter()
        work()
        if on.is_cuda:
            torch.cuda.synchronize(on.device)
        seconds = torch.tensor(time.perf_counter() - start, device=on.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        rounds.append(float(seconds))
    return min(rounds[2:])  # the first two set up connections


def main(meet: str, result: str, ranks: int, rank: int) -> None:
    """Run one of the ranks. Rank 0 writes the result to a file.

    Args:
        meet: The file through which ranks meet.
        result: The file for the result.
        ranks: The number of ranks.
        rank: This rank.
    """
    on_gpu = torch.cuda.device_count() >= ranks
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{meet}", rank=rank, world_size=ranks, timeout=LIMIT
    )
    rates = rates_of(rank, ranks, device)
    dist.destroy_process_group()
    if rank == 0:
        Path(result).write_text(json.dumps(rates), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
