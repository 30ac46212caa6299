"""The trainer, units and bank, optimizers, statistics and checkpoints.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.training.trainer import SaeTrainer

__all__ = ["SaeTrainer"]
