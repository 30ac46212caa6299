"""Times training steps of one SAE on given activations, and prints a line of JSON: `python saekit_step.py JOB.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from saekit.machine import keep_memory

keep_memory()  # as `saekit train` does

import torch
from measure import PeakMemory, summary, time_steps
from one_unit import OneUnit
from recipes import REFERENCE
from safetensors.torch import load_file

from saekit import TrainConfig
from saekit.sae.kernels import choose_kernels

RECIPE = {**REFERENCE, "lr": 2e-4}
"""The peer's recipe, so that the results can be compared."""


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device(job["device"])
    x_ND = load_file(job["activations"])["x"].to(device, torch.bfloat16 if job["bf16"] else torch.float32)
    make_unit(job | {"num_latents": 64}, x_ND[:64].clone()).step()  # let libraries allocate their own memory first
    peak = PeakMemory(device)
    unit = make_unit(job, x_ND)
    seconds = time_steps(unit.step, job["steps"], device)
    found = summary(seconds, len(x_ND), peak.bytes(), unit.held())
    sae = unit.sae
    with torch.no_grad():
        x = x_ND.float()
        found["fvu"] = float((sae.eval()(x).recon - x).square().sum() / (x - x.mean(0)).square().sum())
    found["kernels"] = f"{sae.kernels.name}/{sae.kernels.select_dtype or torch.float32}".replace("torch.", "")
    sys.stdout.write(json.dumps(found) + "\n")


def make_unit(job: dict[str, Any], x_ND: torch.Tensor) -> OneUnit:
    """Make the job's unit."""
    cfg = TrainConfig(**RECIPE, moments_dtype=job["moments_dtype"])
    kernels = choose_kernels(job["kernels"], job["select_dtype"], x_ND.device)
    return OneUnit(cfg, x_ND, job["num_latents"], job["k"], kernels)


if __name__ == "__main__":
    main()
