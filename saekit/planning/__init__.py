"""Plans a run before it starts: memory, traffic and time under each placement, from the model's config alone.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.planning.advice import Advice, advise
from saekit.planning.calibration import measure_rates
from saekit.planning.machine import Machine, describe, detect
from saekit.planning.memory import NO_OFFLOAD, Offload
from saekit.planning.plan import Choice, Plan, make_plan

__all__ = [
    "NO_OFFLOAD",
    "Advice",
    "Choice",
    "Machine",
    "Offload",
    "Plan",
    "advise",
    "describe",
    "detect",
    "make_plan",
    "measure_rates",
]
