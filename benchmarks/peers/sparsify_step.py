"""Times eai-sparsify's training step as its trainer does it: `python sparsify_step.py JOB.json`, prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import PeakMemory, summary, time_steps

del sys.path[0]  # transformers looks for a package that has the name of one of the scripts there
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device(job["device"])
    torch.set_float32_matmul_precision("high")  # Trainer.fit does
    x_ND = load_file(job["activations"])["x"].to(device, torch.bfloat16 if job["bf16"] else torch.float32)
    make_step(job | {"num_latents": 64}, x_ND[:64].clone())[0]()  # libraries start up: no part of what a step needs
    peak = PeakMemory(device)
    step, sae, optimizer = make_step(job, x_ND)
    seconds = time_steps(step, job["steps"], device)
    state = [value for each in optimizer.state.values() for value in each.values()]
    found = summary(seconds, len(x_ND), peak.bytes(), [*sae.parameters(), *state])
    with torch.no_grad():
        found["fvu"] = float(sae(x_ND.to(sae.dtype)).fvu)
    sys.stdout.write(json.dumps(found) + "\n")


def make_step(job: dict[str, Any], x_ND: torch.Tensor) -> tuple[Callable[[], None], SparseCoder, torch.optim.Optimizer]:
    """A training step, as its trainer does it, and what it trains."""
    torch.manual_seed(0)
    config = SparseCoderConfig(num_latents=job["num_latents"], k=job["k"])
    sae = SparseCoder(job["d_in"], config, device=x_ND.device)
    sae.b_dec.data.copy_(x_ND.float().mean(0))
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4)

    def step() -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x_ND.to(sae.dtype))
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step, sae, optimizer


if __name__ == "__main__":
    main()
