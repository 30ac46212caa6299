"""What BatchTopK and other selections are moved by between steps, counted over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.placement import Placement
from saekit.training.state import RunState
from saekit.training.statistics import LayerWindow


def count_codes(
    cfg: TrainConfig,
    run: RunState,
    windows: Mapping[str, LayerWindow],
    hookpoints: Sequence[str],
    placement: Placement,
) -> dict[str, Tensor]:
    """What the selections of this rank's layers are moved by: int64 `[2 + num_sums]`. Collective.

    Firings, tokens, and `Selection.sums`. Empty where nothing moves. They are whole numbers, so that they and what is
    moved by them are the same on all ranks of a layer, whatever the order in which they are added up.

    Args:
        cfg: How to train.
        run: Its counters have seen the step and not forgotten it.
        windows: Of this rank's layers and of this step alone.
        hookpoints: Of all layers.
        placement: Where the layers are.
    """
    kind = cfg.sae.kind
    if not kind.moves:
        return {}
    counts = torch.zeros(len(hookpoints), 2 + kind.num_sums, dtype=torch.int64, device=placement.device)
    for name, window in windows.items():
        row = counts[hookpoints.index(name)]
        row[0], row[1], row[2:] = run.counters[name].fired_now_M.sum(), window.moments.count, window.selection_sums
    counts = placement.sum(counts)
    return {name: counts[hookpoints.index(name)] for name in windows}


def move_selections_(run: RunState, counts: Mapping[str, Tensor], placement: Placement) -> None:
    """Move the selections of this rank's layers after a step that counts, in place; `counts` are `count_codes`'."""
    for name, (firings, tokens, *_) in counts.items():
        placement.sae(name).selection.move_(firings, tokens, counts[name][2:], run.calibration[name].rms)
