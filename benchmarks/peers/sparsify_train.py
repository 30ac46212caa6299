"""Trains eai-sparsify's SAEs as a job file says: `python sparsify_train.py JOB.json`, in the peer's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from transformers import AutoModel

NEVER = 10**9


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = AutoModel.from_pretrained(job["model"], dtype="float32").eval()
    names = job["hookpoints"] if job["reads"] is None else as_modules(model, job["reads"], job["hookpoints"])
    out = Path(job["out"])
    settings = dict(job["settings"])
    cfg = TrainConfig(
        SparseCoderConfig(
            num_latents=job["num_latents"], k=job["k"], transcode=job["reads"] is not None, **settings.pop("sae", {})
        ),
        batch_size=job["batch_size"],
        exclude_tokens=job["exclude_tokens"],
        hookpoints=names,
        init_seeds=[job["seed"]],
        save_every=NEVER,
        log_to_wandb=False,
        save_dir=str(out.parent),
        run_name=out.name,
        **settings,
    )
    trainer = Trainer(cfg, load_from_disk(job["data"]).with_format("torch"), model)
    if trainer.cfg.hookpoints != names:
        raise SystemExit(f"expected the hookpoints {names}, found {trainer.cfg.hookpoints}")
    trainer.fit()
    for name, hookpoint in zip(names, job["hookpoints"], strict=True):
        if name != hookpoint:
            (out / name).rename(out / hookpoint)


class Mlp(torch.nn.Module):
    """BERT's MLP as one module, which it has none for: the package transcodes modules only."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.intermediate, self.dense = layer.intermediate, layer.output.dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer itself computes it."""
        return self.dense(self.intermediate(x))


def as_modules(model: torch.nn.Module, reads: list[str], writes: list[str]) -> list[str]:
    """Names of modules that read and write just these hookpoints; made, where the model has none."""
    found = []
    for read, written in zip(reads, writes, strict=True):
        if read == f"{written}:in":
            found.append(written)
            continue
        prefix = written.removesuffix(".output.dense")
        layer = model.get_submodule(prefix)
        layer.mlp = Mlp(layer)

        def feed_forward(attended: torch.Tensor, layer: torch.nn.Module = layer) -> torch.Tensor:
            return layer.output.LayerNorm(layer.output.dropout(layer.mlp(attended)) + attended)

        layer.feed_forward_chunk = feed_forward
        found.append(f"{prefix}.mlp")
    return found


if __name__ == "__main__":
    main()
