"""Run on every rank by test_replicas.py: SAEs that each rank would begin with other weights, placed by ddp.

Rank 0 writes what it finds to the file that it is given.
"""

import json
import sys
from pathlib import Path

import torch

from saekit import Sae, TrainConfig
from saekit.placement import connect
from saekit.placement.replicas import checksum, tensors_of
from saekit.training.optimizers import make_optimizer

NAMES = ["layers.0", "layers.1", "layers.2"]


def main(result):
    placement = connect("ddp")
    rank = placement.rank
    blanks, exported = [], []

    def make_sae(hookpoint, *, blank=False):
        """As two CPUs would make it that round differently, but plain to see."""
        sae = Sae(8, 16, 2, selection="batchtopk", generator=torch.Generator().manual_seed(rank))
        sae.selection.threshold.fill_(10 * rank + NAMES.index(hookpoint))
        blanks.extend([hookpoint] if blank else [])
        return sae

    def optimizer_of(sae):
        exported.append(float(sae.W_dec.detach().sum()))  # some keep a copy of the weights that they start from
        return make_optimizer(TrainConfig(optimizer="signum"), sae)

    placement.place(NAMES, make_sae, optimizer_of)
    saes = [placement.sae(name) for name in NAMES]
    found = {
        "blank": placement.gather(blanks),
        "thresholds": placement.gather([float(sae.selection.threshold) for sae in saes]),
        "weights": placement.gather([[float(each.sum()) for each in tensors_of(sae)] for sae in saes]),
        "sums": placement.gather([int(checksum(tensors_of(sae))) for sae in saes]),
        "optimizers": placement.gather(exported),
        "strays": [placement.strays()],
    }
    if rank == 1:
        with torch.no_grad():
            saes[1].W_enc[3, 2].copy_(torch.nextafter(saes[1].W_enc[3, 2], torch.tensor(9.0)))
    found["strays"].append(placement.strays())
    if rank == 1:
        saes[2].selection.threshold.mul_(1 + 2**-52)
    found["strays"].append(placement.strays())
    placement.close()
    if rank == 0:
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
