"""Trains eai-sparsify's SAEs as a job file says: `python sparsify_train.py JOB.json`, in the peer's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import load_from_disk
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from transformers import AutoModel

NEVER = 10**9


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = AutoModel.from_pretrained(job["model"], dtype="float32").eval()
    out = Path(job["out"])
    settings = dict(job["settings"])
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=job["num_latents"], k=job["k"], **settings.pop("sae", {})),
        batch_size=job["batch_size"],
        exclude_tokens=job["exclude_tokens"],
        hookpoints=job["hookpoints"],
        init_seeds=[job["seed"]],
        save_every=NEVER,
        log_to_wandb=False,
        save_dir=str(out.parent),
        run_name=out.name,
        **settings,
    )
    trainer = Trainer(cfg, load_from_disk(job["data"]).with_format("torch"), model)
    if trainer.cfg.hookpoints != job["hookpoints"]:
        raise SystemExit(f"expected the hookpoints {job['hookpoints']}, found {trainer.cfg.hookpoints}")
    trainer.fit()


if __name__ == "__main__":
    main()
