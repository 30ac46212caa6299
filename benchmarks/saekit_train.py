"""Trains saekit's SAEs for a job: `python saekit_train.py JOB.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import AutoModel

from saekit import SaeConfig, SaeTrainer, TrainConfig

NEVER = 10**9


def where(job: dict[str, Any]) -> dict[str, Any]:
    """Return the options that say what coders read and write."""
    if job["crosscode"]:
        return {"crosscode": tuple(job["hookpoints"])}
    if job["reads"] is not None:
        return {"reads": tuple(job["reads"]), "writes": tuple(job["hookpoints"])}
    return {"layers": tuple(int(name.rsplit(".", 1)[1]) for name in job["hookpoints"])}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = AutoModel.from_pretrained(job["model"], dtype="float32").eval()
    out = Path(job["out"])
    out.rmdir()  # the trainer makes its own run folder
    settings = dict(job["settings"])
    cfg = TrainConfig(
        sae=SaeConfig(num_latents=job["num_latents"], k=job["k"], **settings.pop("sae", {})),
        **where(job),
        init_seed=job["seed"],
        batch_size=job["batch_size"],
        shuffle=False,
        exclude_tokens=job["exclude_tokens"],
        exclude_special_tokens=False,
        save_dir=out.parent,
        run_name=out.name,
        save_every=NEVER,
        log_every=50,
        **settings,
    )
    trainer = SaeTrainer(cfg, load_from_disk(job["data"]), model)
    written = [hookpoint.name for site in trainer.plan.sites for hookpoint in site.writes]
    if written != job["hookpoints"]:
        raise SystemExit(f"expected the hookpoints {job['hookpoints']}, found {written}")
    trainer.fit()


if __name__ == "__main__":
    main()
