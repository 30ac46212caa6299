"""What `saekit doctor` looks at on a machine, what will not work there, and how to mend it."""

from saekit.doctor.checks import can_train, diagnose, findings_to_json
from saekit.doctor.findings import Finding

__all__ = ["Finding", "can_train", "diagnose", "findings_to_json"]
