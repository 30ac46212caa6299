"""What the losses of an optimiser step are divided by: numbers that are fixed before its first backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.placement import Placement
from saekit.training.state import RunState
from saekit.training.statistics import LayerWindow


class Scales(NamedTuple):
    """Of one layer in one step of N tokens."""

    main: float
    """`1 / (N σ²)`, of the reconstruction's loss."""
    auxk: float | Tensor
    """Of AuxK's: the same, or `1 / (N e)` with the mean squared error e of the step before."""
    revive: float
    """`1 / (N σ₁)`, of the loss that raises dead latents' biases."""


def scales_of(cfg: TrainConfig, run: RunState, name: str, tokens: int) -> Scales:
    """A layer's scales in a step of so many tokens over all ranks.

    What dead latents are to predict shrinks as the SAE gets better, and their gradient with it, while Adam remembers
    the gradients of the time when they were alive. Divided by the error, the AuxK loss begins near 1 in every step, as
    in the code of Gao et al. 2024. It is the error of the step before: this step's is known only when its last chunk
    is through.
    """
    layer = run.calibration[name]
    main = 1 / (max(1, tokens) * layer.variance)
    revive = 1 / (max(1, tokens) * layer.rms)
    if cfg.auxk_relative_to == "variance":
        return Scales(main, main, revive)
    # A perfect reconstruction leaves nothing to divide by, and nothing to predict.
    least = 1e-9 * layer.variance
    return Scales(main, (1 / (max(1, tokens) * run.error[name].clamp_min(least))).float(), revive)


def error_per_token(
    cfg: TrainConfig, windows: Mapping[str, LayerWindow], hookpoints: Sequence[str], tokens: int, placement: Placement
) -> dict[str, Tensor]:
    """The mean squared error of a step by layer of this rank: float64 scalars; empty if no scale needs it. Collective.

    Args:
        cfg: How to train.
        windows: Of this rank's layers and of this step alone.
        hookpoints: Of all layers.
        tokens: Of the step, over all ranks.
        placement: Where the layers are.
    """
    if cfg.auxk_relative_to == "variance":
        return {}
    errors = torch.zeros(len(hookpoints), dtype=torch.float64, device=placement.device)
    for name, window in windows.items():
        errors[hookpoints.index(name)] = window.sums[0]
    errors = placement.sum(errors) / max(1, tokens)
    return {name: errors[hookpoints.index(name)] for name in windows}
