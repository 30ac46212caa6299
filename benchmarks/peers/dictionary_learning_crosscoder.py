"""Trains the BatchTopK crosscoder of a fork of dictionary-learning as a job says, in its environment: `... JOB.json`.

The fork, github.com/jkminder/dictionary_learning, trains from activations that its own scripts have stored. Here its
trainer gets them step by step, so that it sees the tokens that saekit sees, in their order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from dictionary_learning.trainers.crosscoder import BatchTopKCrossCoderTrainer
from torch import Tensor
from transformers import AutoModel


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = AutoModel.from_pretrained(job["model"], dtype="float32").eval()
    data = load_from_disk(job["data"]).with_format("torch")
    settings = dict(job["settings"])
    scale_each = settings.pop("scale_each")
    seen: dict[str, Tensor] = {}
    for hookpoint in job["hookpoints"]:
        model.get_submodule(hookpoint).register_forward_hook(
            lambda _, args, out, name=hookpoint: seen.update({name: out if isinstance(out, Tensor) else out[0]})
        )
    excluded = torch.tensor(job["exclude_tokens"])

    trainer = None
    for step, batch in enumerate(data.iter(job["batch_size"], drop_last_batch=True)):
        kept = ~torch.isin(batch["input_ids"], excluded)
        with torch.no_grad():
            model(input_ids=batch["input_ids"])
        x_NLD = torch.stack([seen[name][kept] for name in job["hookpoints"]], dim=1)
        if trainer is None:
            # Its own normalization, a mean and one scale for all numbers, or one scale for each hookpoint.
            mean_LD = x_NLD.mean(0)
            variance_L = (x_NLD - mean_LD).square().sum(2).mean(0)
            scale_L = variance_L.rsqrt() if scale_each else variance_L.sum().rsqrt().expand_as(variance_L)
            trainer = BatchTopKCrossCoderTrainer(
                steps=len(data) // job["batch_size"],
                activation_dim=x_NLD.shape[2],
                dict_size=job["num_latents"],
                k=job["k"],
                layer=0,
                lm_name=job["model"],
                num_layers=len(job["hookpoints"]),
                seed=job["seed"],
                device="cpu",
                **settings,
            )
        trainer.update(step, (x_NLD - mean_LD) * scale_L[:, None])
    assert trainer is not None, "there is a step"
    folder = Path(job["out"], "crosscoder")
    folder.mkdir()
    torch.save({**trainer.ae.state_dict(), "mean": mean_LD, "scale": scale_L.clone()}, folder / "ae.pt")


if __name__ == "__main__":
    main()
