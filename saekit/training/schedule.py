"""The learning rate as a function of the optimizer step alone, so that a resumed run cannot disagree with it."""

from __future__ import annotations

WARMUP_SHARE = 0.3
"""Of the run, by default, where the rate falls afterwards: measured in docs/quality-defaults.md."""
CONSTANT_WARMUP_SHARE = 0.1
"""The same where it stays: a schedule-free optimizer averages over the rest."""
SLEEPS_OF_THE_DEAD, STEPS_OF_THE_DEAD = 300, 10
MOST_TOKENS_ASLEEP = 10_000_000


def warmup_steps(asked: int | None, total_steps: int, *, decay: bool) -> int:
    """Return the optimizer steps of warm-up: as requested, or a share of the run that depends on what follows."""
    share = WARMUP_SHARE if decay else CONSTANT_WARMUP_SHARE
    return int(share * total_steps) if asked is None else asked


def dead_threshold(asked: int | None, *, total_tokens: int, step_tokens: int, num_latents: int, k: int) -> int:
    """Return tokens without firing after which a latent is dead: what was asked for, or what suits the run.

    By default that is 300 times as long as a latent sleeps on average, which is M / k tokens, but ten optimizer steps
    at least; of a short run a fiftieth; and never more than the 10M tokens of Gao et al. 2024, appendix A.2, whose runs
    are of billions of tokens. In a run of fewer than that nothing would ever be dead.

    Args:
        asked: By the user.
        total_tokens: Of the run.
        step_tokens: Of an optimizer step, over all ranks.
        num_latents: M.
        k: Active latents per token.
    """
    if asked is not None:
        return asked
    long = max(SLEEPS_OF_THE_DEAD * num_latents // k, STEPS_OF_THE_DEAD * step_tokens)
    return max(1, min(total_tokens // 50, long, MOST_TOKENS_ASLEEP))


def lr_scale(step: int, *, warmup: int, total_steps: int, decay: bool) -> float:
    """Factor on the base learning rate of optimizer step `step`, which counts from 0.

    It rises linearly over the first `warmup` steps (the first step is already above zero), then falls linearly, and
    would reach zero one step after the last. All arguments count optimizer steps.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if not decay:
        return 1.0
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))
