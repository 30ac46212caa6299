"""The learning rate as a function of the optimizer step alone, so a resumed run has the same schedule."""

from __future__ import annotations

WARMUP_SHARE = 0.3
"""The default share of the run that is warm-up, if the rate falls afterwards (docs/quality-defaults.md)."""
CONSTANT_WARMUP_SHARE = 0.1
"""The same if the rate stays constant: a schedule-free optimizer averages over the rest."""
DEAD_AFTER_INTERVALS, DEAD_AFTER_STEPS = 300, 10
"""The default dead threshold in mean intervals between two firings (M / k tokens), and its minimum in steps."""
MAX_DEAD_THRESHOLD = 10_000_000
"""The largest default of the dead threshold, in tokens."""


def warmup_steps(requested: int | None, total_steps: int, *, decay: bool) -> int:
    """Return the optimizer steps of warm-up: as requested, or a share of the run.

    Args:
        requested: By the user; None for the default.
        total_steps: Optimizer steps of the run.
        decay: Whether the learning rate falls after warm-up.
    """
    share = WARMUP_SHARE if decay else CONSTANT_WARMUP_SHARE
    return int(share * total_steps) if requested is None else requested


def dead_threshold(requested: int | None, *, total_tokens: int, step_tokens: int, num_latents: int, k: int) -> int:
    """Return the tokens without firing after which a latent is dead: as requested, or a default that suits the run.

    A latent fires about every M / k tokens. The default is 300 times that, at least ten optimizer steps, at most a
    fiftieth of the run, and at most 10M tokens. Gao et al. 2024 (appendix A.2) use 10M tokens for runs of billions of
    tokens; in shorter runs, no latent would ever be dead with that threshold.

    Args:
        requested: By the user; None for the default.
        total_tokens: Tokens of the run.
        step_tokens: Tokens of an optimizer step, over all ranks.
        num_latents: M.
        k: Active latents per token.
    """
    if requested is not None:
        return requested
    long = max(DEAD_AFTER_INTERVALS * num_latents // k, DEAD_AFTER_STEPS * step_tokens)
    return max(1, min(total_tokens // 50, long, MAX_DEAD_THRESHOLD))


def lr_scale(step: int, *, warmup: int, total_steps: int, decay: bool) -> float:
    """Return the factor on the base learning rate in optimizer step `step`, counted from 0.

    The factor rises linearly over the first `warmup` steps, starting above zero. With `decay` it then falls linearly
    and would reach zero one step after the last. All arguments are in optimizer steps.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if not decay:
        return 1.0
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))
