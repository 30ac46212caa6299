"""Trains dictionary-learning's TopK or BatchTopK SAEs as a job file says, in the peer's environment: `... JOB.json`.

Its own loop trains on one layer and keeps a buffer of shuffled activations. Here its trainers are given the
activations of all layers, step by step, so that they see the tokens that the other toolkits see, in their order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from transformers import AutoModel

TRAINERS = {"topk": (TopKTrainer, AutoEncoderTopK), "batchtopk": (BatchTopKTrainer, BatchTopKSAE)}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = AutoModel.from_pretrained(job["model"], dtype="float32").eval()
    data = load_from_disk(job["data"]).with_format("torch")
    settings = dict(job["settings"])
    normalise = settings.pop("normalize_activations", False)  # an option of its loop, not of its trainer
    trainer_class, dict_class = TRAINERS[settings.pop("sae", {}).get("activation", "topk")]
    steps = len(data) // job["batch_size"]
    trainers: dict[str, TopKTrainer | BatchTopKTrainer] = {}
    norms: dict[str, float] = {}

    seen: dict[str, torch.Tensor] = {}
    for hookpoint in job["hookpoints"]:
        block = model.get_submodule(hookpoint)
        block.register_forward_hook(
            lambda _, args, out, name=hookpoint: seen.update({name: out if isinstance(out, torch.Tensor) else out[0]})
        )
    excluded = torch.tensor(job["exclude_tokens"])
    for step, batch in enumerate(data.iter(job["batch_size"], drop_last_batch=True)):
        kept = ~torch.isin(batch["input_ids"], excluded)
        with torch.no_grad():
            model(input_ids=batch["input_ids"])
        for number, hookpoint in enumerate(job["hookpoints"]):
            x_ND = seen[hookpoint][kept]
            if step == 0:
                # Its loop scales activations to a mean square norm of 1 where it is asked to.
                norms[hookpoint] = float(x_ND.square().sum(1).mean().sqrt()) if normalise else 1.0
                trainers[hookpoint] = trainer_class(
                    steps=steps,
                    activation_dim=x_ND.shape[1],
                    dict_size=job["num_latents"],
                    k=job["k"],
                    layer=number,
                    lm_name=job["model"],
                    dict_class=dict_class,
                    seed=100_003 * job["seed"] + number,
                    device="cpu",
                    **settings,
                )
            trainers[hookpoint].update(step, x_ND / norms[hookpoint])
    for hookpoint, trainer in trainers.items():
        trainer.ae.scale_biases(norms[hookpoint])
        folder = Path(job["out"], hookpoint)
        folder.mkdir()
        torch.save(trainer.ae.state_dict(), folder / "ae.pt")


if __name__ == "__main__":
    main()
