"""Run on every rank by test_zero3.py: what a rank holds of a sharded model, and what it reads.

Rank 0 writes into the file `found` the share of the large tensors that it holds between two forward passes, and the
largest difference of the activations from those of the whole model.
"""

import sys
from pathlib import Path

import torch

from saekit.activations import load_model, model_shape, tap
from saekit.config import ModelConfig
from saekit.placement import connect
from saekit.placement.deepspeed import load_sharded


def main(folder):
    placement = connect("zero3")
    cfg, names = ModelConfig(model=folder, dtype="float32"), ["h.0", "h.1"]
    shape = model_shape(cfg)
    whole = load_model(cfg, shape, len(names), placement.device)
    sharded = load_sharded(lambda: load_model(cfg, shape, len(names), placement.device, sharded=True), torch.float32)
    ids = torch.randint(2, 2000, (3, 8), generator=torch.Generator().manual_seed(placement.rank))
    with tap(whole, names) as read_whole, tap(sharded, names) as read_sharded:
        expected = read_whole(ids)
        for _ in range(3):  # DeepSpeed fetches ahead once it knows the order
            found = read_sharded(ids)
    large = [parameter for parameter in sharded.parameters() if parameter.ds_numel > 10_000]  # small ones stay whole
    held = sum(parameter.numel() + parameter.ds_tensor.numel() for parameter in large)
    share = held / sum(parameter.ds_numel for parameter in large)
    furthest = max(float((found[name] - expected[name]).abs().max()) for name in names)
    furthest = max(placement.gather(furthest))
    rank = placement.rank
    placement.close()
    if rank == 0:
        Path("found").write_text(f"{share} {furthest}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
