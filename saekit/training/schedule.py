"""The learning rate as a function of the optimiser step alone, so that a resumed run cannot disagree with it."""

from __future__ import annotations

DEFAULT_WARMUP_STEPS = 1000


def warmup_steps(asked: int | None, total_steps: int) -> int:
    """Optimiser steps of warm-up: what was asked for, or 1000 or a tenth of the run if that is less."""
    return min(DEFAULT_WARMUP_STEPS, total_steps // 10) if asked is None else asked


def lr_scale(step: int, *, warmup: int, total_steps: int, decay: bool) -> float:
    """Factor on the base learning rate of optimiser step `step`, which counts from 0.

    It rises linearly over the first `warmup` steps (the first step is already above zero), then falls linearly, and
    would reach zero one step after the last. All arguments count optimiser steps.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if not decay:
        return 1.0
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))
