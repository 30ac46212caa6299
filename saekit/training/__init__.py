"""The training loop and what it keeps: optimisers, counters, statistics, checkpoints."""

from saekit.training.trainer import SaeTrainer

__all__ = ["SaeTrainer"]
