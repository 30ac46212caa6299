"""Times eai-sparsify's whole trainer: `python sparsify_rate.py JOB.json`, prints a line of JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import itertools

import torch
from datasets import load_from_disk
from measure import PeakMemory, synchronize

del sys.path[0]  # transformers looks for a package that has the name of one of the scripts there
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from transformers import AutoModel

NEVER = 10**9


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    device = torch.device(job["device"])
    peak = PeakMemory(device)
    model = AutoModel.from_pretrained(job["model"], dtype=job["lm_dtype"]).to(device).eval()
    out = Path(job["out"])
    cfg = TrainConfig(
        SparseCoderConfig(expansion_factor=job["expansion"], k=job["k"]),
        batch_size=job["batch_size"],
        optimizer="adam",
        save_every=NEVER,
        log_to_wandb=False,
        save_dir=str(out.parent),
        run_name=out.name,
    )
    trainer = Trainer(cfg, load_from_disk(job["data"]).with_format("torch"), model)
    ends: list[float] = []
    optimizer = trainer.optimizers[0]
    step = optimizer.step

    def timed(*args: object) -> None:
        step(*args)
        synchronize(device)
        ends.append(time.perf_counter())

    optimizer.step = timed
    trainer.fit()
    seconds = [later - earlier for earlier, later in itertools.pairwise(ends)]
    found = {
        "tokens_per_second": job["tokens_per_step"] / statistics.median(seconds[job["warm_up"] :]),
        "peak_bytes": peak.bytes(),
        "sites": len(trainer.saes),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
