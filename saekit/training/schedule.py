"""The learning rate as a function of the optimiser step alone, so that a resumed run cannot disagree with it."""

from __future__ import annotations

WARMUP_SHARE = 0.3
"""Of the run, by default, where the rate falls afterwards: measured in docs/quality.md."""
CONSTANT_WARMUP_SHARE = 0.1
"""The same where it stays: a schedule-free optimiser averages over the rest."""
MOST_TOKENS_ASLEEP = 10_000_000


def warmup_steps(asked: int | None, total_steps: int, *, decay: bool) -> int:
    """Optimiser steps of warm-up: what was asked for, or a share of the run that depends on what follows."""
    share = WARMUP_SHARE if decay else CONSTANT_WARMUP_SHARE
    return int(share * total_steps) if asked is None else asked


def dead_threshold(asked: int | None, total_tokens: int) -> int:
    """Tokens without firing after which a latent is dead: what was asked for, or a fiftieth of the run's, at most 10M.

    The 10M are those of Gao et al. 2024, appendix A.2, whose runs are of billions of tokens; in a run of fewer than
    that nothing would ever be dead.
    """
    return min(MOST_TOKENS_ASLEEP, max(1, total_tokens // 50)) if asked is None else asked


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
