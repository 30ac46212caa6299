"""BatchTopK's threshold of each layer: fixed during an optimiser step, moved between steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.placement import Placement
from saekit.sae import Sae
from saekit.sae.kernels.eager import encode_topk
from saekit.sae.model import NEAR
from saekit.training.state import RunState
from saekit.training.statistics import LayerWindow

GAIN = 0.5
"""How much of the way to the threshold that seems right is gone in a step.

Measured on the demo's language model, all six layers, 147 steps of 2048 tokens. While values grow, mean L0 lags
behind, by less the higher the gain and the longer the run: at k 32 it was 1.4 to 3.0% below k over the whole run and
0.2 to 1.1% in its second half, at k 8 1.2 to 1.4% and up to 0.4%. At a gain of 0.75 one layer's L0 swung up to twice k
at k 8. With a fixed exponent in the place of GAIN / s that suits k 32, it swung by half of k there.
Over 293 steps at k 32 it was 0.8 to 1.7% below k.
"""
FASTEST = 0.3
"""The most that a threshold's logarithm moves by in a step."""
STEEPNESS = (1.0, 30.0)
"""Between what the steepness is taken to be, however few values it is counted from."""
LEAST = 1e-3
"""The smallest threshold, in units of the layer's root mean square: what is multiplied cannot leave zero."""


@torch.no_grad()
def fit_threshold_(sae: Sae, rows_RD: Tensor, rms: float) -> None:
    """Set a fresh SAE's threshold so that it gives k latents on average, in place; nothing happens to a TopK SAE.

    Args:
        sae: A fresh SAE on the CPU.
        rows_RD: `[R, D]`, float32: activations of R tokens.
        rms: The layer's, see `Calibration.rms`.
    """
    if sae.threshold is None:
        return
    acts_RK, _ = encode_topk(rows_RD, sae.W_enc, sae.b_enc, sae.max_active, centre_D=sae.b_dec)
    wanted = sae.k * len(rows_RD)  # so many values are to be above the threshold: it is the largest of the others
    others = acts_RK.flatten().sort(descending=True).values[wanted:]
    sae.threshold = max(float(others[0]) if len(others) else 0.0, LEAST * rms)


def moved(threshold: float, *, k: int, firings: int, near: int, tokens: int, least: float) -> float:
    """A layer's threshold for the next optimiser step.

        θ ← θ · (L0 / k)^(GAIN / s)        L0 = firings / tokens        s = near / (firings · ln NEAR)

    A share of Newton's step: L0 falls about as a power of θ near θ, and s is its exponent, counted in the same step.
    It differs between layers, sizes and times by a factor of several; a fixed rate that follows one swings in another.

    Args:
        threshold: θ of the step that is done.
        k: What mean L0 is to be.
        firings: How many latents were above the threshold in that step, added up over its tokens on all ranks.
        near: How many of them were by a factor of `NEAR` at most.
        tokens: Of the step, over all ranks.
        least: The smallest that it may be.
    """
    if tokens == 0:
        return threshold
    low, high = STEEPNESS
    steepness = min(high, max(low, near / (max(1, firings) * math.log(NEAR))))
    distance = math.log(max(1, firings) / (k * tokens))
    return max(least, threshold * math.exp(max(-FASTEST, min(FASTEST, GAIN / steepness * distance))))


def count_codes(
    cfg: TrainConfig,
    run: RunState,
    windows: Mapping[str, LayerWindow],
    hookpoints: Sequence[str],
    placement: Placement,
) -> Tensor:
    """What thresholds are moved by: int64 `[layers of this rank · 3]`, firings, those `near`, and tokens. Collective.

    Empty without thresholds. They are whole numbers, so that they and the thresholds are the same on all ranks of a
    layer, whatever the order in which they are added up.

    Args:
        cfg: How to train.
        run: Its counters have seen the step and not forgotten it.
        windows: Of this rank's layers and of this step alone.
        hookpoints: Of all layers.
        placement: Where the layers are.
    """
    if cfg.sae.activation != "batchtopk":
        return torch.zeros(0, dtype=torch.int64, device=placement.device)
    counts = torch.zeros(len(hookpoints), 3, dtype=torch.int64, device=placement.device)
    for name, window in windows.items():
        counts[hookpoints.index(name)] = torch.stack(
            [run.counters[name].fired_now_M.sum(), window.near, window.moments.count.long()]
        )
    counts = placement.sum(counts)
    return torch.stack([counts[hookpoints.index(name)] for name in windows]).flatten() if windows else counts[:0, 0]


def move_thresholds_(run: RunState, counts: Sequence[int], placement: Placement) -> None:
    """Move the thresholds of this rank's layers after a step that counts, in place; `counts` are `count_codes`'."""
    for number, name in enumerate(placement.layers() if counts else ()):
        sae, least = placement.sae(name), LEAST * run.calibration[name].rms
        assert sae.threshold is not None, "else nothing was counted"
        firings, near, tokens = counts[3 * number : 3 * number + 3]
        sae.threshold = moved(sae.threshold, k=sae.k, firings=firings, near=near, tokens=tokens, least=least)
