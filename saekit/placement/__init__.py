"""Where SAE parameters live. The only room that may know of ranks."""

from saekit.placement.base import LayerOptimizer, OptimizerFactory, Placement, SaeFactory
from saekit.placement.choose import connect
from saekit.placement.local import Single

__all__ = ["LayerOptimizer", "OptimizerFactory", "Placement", "SaeFactory", "Single", "connect"]
