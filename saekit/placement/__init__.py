"""Where coders and their optimizers are. Only this room may know about ranks.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.placement.base import LayerOptimizer, OptimizerFactory, Placement, SaeFactory
from saekit.placement.choose import connect
from saekit.placement.local import Single

__all__ = ["LayerOptimizer", "OptimizerFactory", "Placement", "SaeFactory", "Single", "connect"]
