"""Trains as `saekit train` does and writes down what this rank held and its peak: `python measured_run.py JOB.json`.

With `ranks` in the job it starts that many, as torchrun does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from saekit.cli.allocator import keep_memory

keep_memory()


def resident_peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def train(job: dict[str, Any]) -> dict[str, int]:
    import torch

    from saekit.config import RunConfig
    from saekit.report import Reporters
    from saekit.training import launch

    torch.set_num_threads(1)
    held = []
    connect = launch.connect

    def observed(*args: Any) -> Any:
        placement = connect(*args)
        apply = placement.apply

        def apply_and_note(scale: float) -> None:
            held.append(placement.held_bytes())  # gradients are there; at the second step the moments are, too
            apply(scale)

        placement.apply = apply_and_note
        return placement

    launch.connect = observed
    launch.train_from_config(RunConfig.from_flat(job["config"]), Reporters())
    return {"held": held[-1], "peak": resident_peak()}


def main() -> None:
    file = Path(sys.argv[1])
    job = json.loads(file.read_text(encoding="utf-8"))
    if job["ranks"] > 1 and "RANK" not in os.environ:
        from torch.distributed.run import main as torchrun

        torchrun(["--standalone", f"--nproc-per-node={job['ranks']}", __file__, str(file)])
        return
    out = file.with_name(f"rank{os.environ.get('RANK', '0')}.json")
    out.write_text(json.dumps(train(job)), encoding="utf-8")


if __name__ == "__main__":
    main()
