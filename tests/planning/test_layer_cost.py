"""What a layer's step is found to take, and how much work finding it is."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saekit.config import SaeConfig, TrainConfig
from saekit.placement.costs import Size
from saekit.planning import bank
from saekit.sae.kernels import scores

D, TOKENS = 96, 16_384


class Counted(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def cost(backend, dtype, latents):
    """The cost, and the number of operations that it took to find it."""
    bank.KNOWN.clear()
    cfg = TrainConfig(SaeConfig(num_latents=latents, k=8))
    with Counted() as counted:
        found = bank.layer_cost(
            cfg,
            Size(latents, D, D),
            TOKENS,
            torch.float32,
            bank.on_meta(backend, dtype),
            on_gpu=False,
            owns_gradient=True,
        )
    return found, counted.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "native"])
def test_a_part_of_a_loop_shows_what_all_of_it_takes(monkeypatch, backend, dtype):
    found, operations = cost(backend, dtype, 2**15)
    assert cost(backend, dtype, 2**19)[1] < 1.5 * operations  # a few more turns of a tournament

    def every_piece(total, size, device):
        return [slice(start, min(start + size, total)) for start in range(0, total, size)]

    monkeypatch.setattr(scores, "pieces", every_piece)
    of_all, more = cost(backend, dtype, 2**15)
    assert of_all == found
    assert more > operations
