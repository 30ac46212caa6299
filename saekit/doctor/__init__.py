"""The checks of `saekit doctor`: what will not work on a machine, and how to fix it.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.doctor.checks import can_train, diagnose, findings_to_json
from saekit.doctor.findings import Finding

__all__ = ["Finding", "can_train", "diagnose", "findings_to_json"]
