"""Makes coders of every kind that eai-sparsify knows, in the peer's environment, with random weights.

`python sparsify_coders.py OUT`: OUT gets one folder per coder, `layers.0/seed0` and so on as runs with several seeds
have them. Decoders of transcoders start at zero there; here all weights are random.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch
from sparsify import SparseCoder, SparseCoderConfig

D, EXPANSION, K = 24, 4, 8


@torch.no_grad()
def main() -> None:
    kinds = list(product(("topk", "groupmax"), ((False, False), (True, False), (True, True))))
    for number, (activation, (transcode, skip)) in enumerate(kinds):
        for seed in range(2):
            torch.manual_seed(100 * number + seed)
            config = SparseCoderConfig(
                activation=activation, expansion_factor=EXPANSION, k=K, transcode=transcode, skip_connection=skip
            )
            coder = SparseCoder(D, config)
            for parameter in coder.parameters():
                parameter.normal_()
            coder.save_to_disk(Path(sys.argv[1], f"layers.{number}.mlp", f"seed{seed}"))


if __name__ == "__main__":
    main()
