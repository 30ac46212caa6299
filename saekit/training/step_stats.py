"""What a report says of the optimiser steps since the one before it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from saekit.placement import Placement
from saekit.report.stats import StepStats
from saekit.training.plan import RunPlan
from saekit.training.resources import peak_memory_bytes
from saekit.training.state import RunState
from saekit.training.statistics import LayerWindow, read_row


def read_windows(
    windows: Mapping[str, LayerWindow],
    num_dead: Mapping[str, int],
    run: RunState,
    plan: RunPlan,
    placement: Placement,
    tokens: int,
    seconds: float,
) -> StepStats:
    """The finished numbers since the last report. Collective.

    Args:
        windows: Of each layer of this rank.
        num_dead: How many latents of each are dead.
        run: Where the run stands.
        plan: What is trained.
        placement: Where.
        tokens: Of all ranks, since the last report.
        seconds: The same.
    """
    rows = {}
    for name, window in windows.items():
        # One rank speaks for what all ranks of a layer know, so that sums over ranks count it once.
        leads = placement.leads(name)
        rows[name] = window.row(num_dead[name] if leads else 0, window.steps if leads else 0)
    memory = torch.zeros(placement.world_size, dtype=torch.float64, device=placement.device)
    memory[placement.rank] = peak_memory_bytes(placement.device)
    blank = LayerWindow.empty(plan.d_in, placement.device).row(0, 0)
    mine = torch.cat([*(rows.get(name, blank) for name in plan.hookpoints), memory])
    together = placement.sum(mine).cpu()  # once, and not number by number
    parts = together[: -placement.world_size].view(len(plan.hookpoints), -1)
    layers = {
        name: read_row(part, tokens, num_latents=plan.num_latents, with_multi_topk=plan.cfg.sae.multi_topk)
        for name, part in zip(plan.hookpoints, parts, strict=True)
    }
    return StepStats(
        step=run.step,
        tokens=run.tokens,
        tokens_per_second=tokens / seconds,
        learning_rate=plan.base_lr * plan.lr_scale(run.step - 1),
        skipped_steps=run.skipped,
        memory_bytes=int(together[-placement.world_size :].max()),
        layers=layers,
    )
