"""The training loop and what it keeps: optimizers, counters, statistics, checkpoints.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.training.trainer import SaeTrainer

__all__ = ["SaeTrainer"]
