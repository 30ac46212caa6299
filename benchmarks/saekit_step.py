"""Times training steps of one SAE on given activations: `python saekit_step.py JOB.json`, prints a line of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saekit.machine import keep_memory

keep_memory()  # as `saekit train` does

import torch
from measure import PeakMemory, summary, time_steps
from recipes import REFERENCE
from safetensors.torch import load_file

from saekit import Sae, TrainConfig
from saekit.sae import sae_losses
from saekit.sae.kernels import choose_kernels
from saekit.training.optimizers import TorchOptimizer, make_optimizer

RECIPE = {**REFERENCE, "lr": 2e-4}
"""The peer's, so that what both reach can be compared."""


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device(job["device"])
    x_ND = load_file(job["activations"])["x"].to(device, torch.bfloat16 if job["bf16"] else torch.float32)
    make_step(job | {"num_latents": 64}, x_ND[:64].clone())[0]()  # libraries start up: no part of what a step needs
    peak = PeakMemory(device)
    step, sae, optimizer = make_step(job, x_ND)
    seconds = time_steps(step, job["steps"], device)
    held = [*sae.parameters(), *optimizer.state().values()]
    found = summary(seconds, len(x_ND), peak.bytes(), held)
    with torch.no_grad():
        x = x_ND.float()
        found["fvu"] = float((sae(x).recon - x).square().sum() / (x - x.mean(0)).square().sum())
    found["kernels"] = f"{sae.kernels.name}/{sae.kernels.select_dtype or torch.float32}".replace("torch.", "")
    sys.stdout.write(json.dumps(found) + "\n")


def make_step(job: dict[str, Any], x_ND: torch.Tensor) -> tuple[Callable[[], None], Sae, TorchOptimizer]:
    """A training step, as the trainer does it on a layer's activations, and what it trains."""
    device = x_ND.device
    sae = Sae(job["d_in"], job["num_latents"], job["k"], generator=torch.Generator().manual_seed(0), device=device)
    sae.train()
    sae.b_dec.data.copy_(x_ND.float().mean(0))
    sae.chosen_kernels = choose_kernels(job["kernels"], job["select_dtype"], device)
    optimizer = make_optimizer(TrainConfig(**RECIPE, moments_dtype=job["moments_dtype"]), sae)
    optimizer.defer_gradients()  # as on one process
    scale = 1 / float((x_ND.float() - x_ND.float().mean(0)).square().sum())

    def step() -> None:
        x = x_ND.float()
        losses = sae_losses(x, sae(x), scale=scale, auxk_alpha=0.0, num_dead=0)
        losses.total.backward()
        optimizer.prepare(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, sae, optimizer


if __name__ == "__main__":
    main()
