"""Trains as `saekit train` does and writes down what this rank held and its peak: `python measured_run.py JOB.json`.

Run by several ranks, each writes a file of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from saekit.machine import keep_memory

keep_memory()


def resident_peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def second_gradients(placement: Any) -> int:
    """Bytes of the gradients that DeepSpeed's optimizer reads, where they are not those that it sums up."""
    zero = placement._engine.optimizer
    summed = zero.grad_partitions_flat_buffer.untyped_storage().data_ptr()
    read = [flat.grad for flat in zero.fp32_partitioned_groups_flat if flat.grad is not None]
    return sum(each.nbytes for each in read if each.untyped_storage().data_ptr() != summed)


def bytes_of(model: Any) -> int:
    """Bytes of a sharded model's tensors at this moment: shards, and what is gathered."""
    return sum(each.data.nbytes + each.ds_tensor.nbytes for each in model.parameters())


def train(job: dict[str, Any]) -> dict[str, int]:
    import torch

    from saekit.config import RunConfig
    from saekit.report import Reporters
    from saekit.training import launch, live

    torch.set_num_threads(1)
    held, sharded = [], []
    for what in ("OPTIMIZER", "PARAM") if job.get("offload") else ():
        os.environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE"] = "cpu"  # as accelerate says it of a launch file
    connect, load = launch.connect, live._load

    def observed(*args: Any) -> Any:
        placement = connect(*args)
        apply = placement.apply

        def apply_and_note(scale: float) -> None:
            # Gradients are there; at the second step the moments are, too.
            held.append(placement.held_bytes() + (second_gradients(placement) if job.get("offload") else 0))
            apply(scale)

        placement.apply = apply_and_note
        return placement

    def loaded(*args: Any) -> Any:
        model = load(*args)
        if hasattr(next(model.parameters()), "ds_tensor"):
            for module in model.modules():  # behind DeepSpeed's hook, which has gathered what the module needs
                module.register_forward_pre_hook(lambda *_: sharded.append(bytes_of(model)))
        return model

    launch.connect, live._load = observed, loaded
    launch.train_from_config(RunConfig.from_flat(job["config"]), Reporters())
    return {"held": held[-1], "peak": resident_peak(), "language_model": max(sharded, default=0)}


def main() -> None:
    file = Path(sys.argv[1])
    job = json.loads(file.read_text(encoding="utf-8"))
    out = file.with_name(f"rank{os.environ.get('RANK', '0')}.json")
    out.write_text(json.dumps(train(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
