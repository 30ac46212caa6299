"""What `saekit doctor` looks at on a machine, what will not work there, and how to mend it.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.doctor.checks import can_train, diagnose, findings_to_json
from saekit.doctor.findings import Finding

__all__ = ["Finding", "can_train", "diagnose", "findings_to_json"]
