"""Reconstructs activations with SAE folders through eai-sparsify, in the peer's environment.

`python sparsify_reconstruct.py SAES ACTIVATIONS.safetensors OUT.safetensors`: SAES holds one folder per hookpoint, the
two files one tensor `[N, D]` per hookpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder


@torch.no_grad()
def main() -> None:
    saes, activations, out = map(Path, sys.argv[1:])
    found = {}
    for hookpoint, x in load_file(activations).items():
        found[hookpoint] = SparseCoder.load_from_disk(saes / hookpoint)(x).sae_out.contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main()
