"""Trains with one placement and records each rank's traffic and memory: `python placement_worker.py JOB.json`.

A single process starts the job's ranks, as `torchrun` does. Each rank trains and writes its readings.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import struct
import sys
from pathlib import Path
from typing import Any

NEVER = 10**9
TIME_LIMIT = 600
"""The time limit in seconds. SIGALRM then ends a rank that waits forever, and the launcher ends the others."""
TCP_INFO_SIZE = 256
BYTES_ACKED_OFFSET = 120
"""The offset of `tcpi_bytes_acked` in `struct tcp_info` (linux/tcp.h). `tcpi_bytes_received` follows; both are u64."""


def tcp_bytes() -> tuple[int, int]:
    """Return the bytes that this process's open TCP sockets have sent and received, as the kernel counts them.

    Only payload counts. Sent bytes count when they are acknowledged, which is immediate between processes of one
    machine. Gloo opens one connection per pair of ranks and group. The connection to the launcher's store is included.
    """
    sent = received = 0
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(number).st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as each:
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
        except OSError:  # the socket has been closed, or is not TCP
            continue
        more_sent, more_received = struct.unpack_from("=QQ", info, BYTES_ACKED_OFFSET)
        sent, received = sent + more_sent, received + more_received
    return sent, received


class Meter:
    """Wraps a placement's `apply`, and reads the counters in two of the optimizer steps.

    Before `apply` the gradients are in memory; after it their exchange is complete. Nothing is reported between the two
    steps, so all traffic between them is training.
    """

    def __init__(self, placement: Any, first: int, last: int) -> None:
        self.placement, self.first, self.last = placement, first, last
        self.step = 0
        self.seen: dict[int, tuple[int, int]] = {}
        self.held = 0
        self._apply = placement.apply
        placement.apply = self.apply

    def apply(self, lr_scale: float) -> None:
        """See `Placement.apply`."""
        self.step += 1
        if self.step == self.last:
            self.held = self.placement.held_bytes()
        self._apply(lr_scale)
        if self.step in (self.first, self.last):
            import torch.distributed

            torch.distributed.barrier()  # so that no rank still sends bytes of this step, or already of the next
            self.seen[self.step] = tcp_bytes()
            torch.distributed.barrier()

    def readings(self) -> dict[str, Any]:
        """Return bytes per optimizer step, bytes held, and the units that this rank trains."""
        steps = self.last - self.first
        sent, received = (
            (after - before) / steps for before, after in zip(self.seen[self.first], self.seen[self.last], strict=True)
        )
        return {"sent": sent, "received": received, "held": self.held, "held_units": self.placement.layers()}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train with a random model on random tokens, and return this rank's readings."""
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from saekit import SaeConfig, SaeTrainer, TrainConfig
    from saekit.placement import connect
    from saekit.report import Reporters

    datasets.disable_progress_bars()
    placement = connect(job["placement"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=job["d_in"],
            intermediate_size=2 * job["d_in"],
            num_hidden_layers=job["layers"],
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=job["ctx_len"],
        )
    )
    model = model.to(getattr(torch, job["dtype"])).eval()
    sequences = job["steps"] * job["batch_size"] * job["micro_batches"] * placement.world_size
    tokens = torch.randint(0, 512, (sequences, job["ctx_len"]))
    cfg = TrainConfig(
        sae=SaeConfig(num_latents=job["num_latents"], k=job["k"], skip_connection=job["skip"]),
        batch_size=job["batch_size"],
        grad_acc_steps=job["micro_batches"],
        micro_acc_steps=job["chunks"],
        exclude_special_tokens=False,
        save_dir=Path(job["out"]),
        run_name="run",
        save_every=NEVER,
        log_every=NEVER,
        **job["coders"],
    )
    data = datasets.Dataset.from_dict({"input_ids": tokens.tolist()})
    meter = Meter(placement, first=job["first"], last=job["steps"])
    trainer = SaeTrainer(cfg, data, model, placement=placement, reporter=Reporters())
    trainer.fit()
    readings = {**meter.readings(), "units": {each.name: each.size for each in trainer.plan.units}}
    placement.close()
    return readings


def main() -> None:
    file = Path(sys.argv[1])
    job = json.loads(file.read_text(encoding="utf-8"))
    if "RANK" not in os.environ:
        from torch.distributed.run import main as torchrun

        torchrun(["--standalone", f"--nproc-per-node={job['world_size']}", __file__, str(file)])
        return
    signal.alarm(TIME_LIMIT)
    readings = train(job)
    out = Path(job["out"]) / f"rank{os.environ['RANK']}.json"
    out.write_text(json.dumps(readings), encoding="utf-8")


if __name__ == "__main__":
    main()
