"""Reporters: who watches a run.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.report.base import Reporter, Reporters
from saekit.report.stats import EvalStats, LayerStats, Lowest, RunInfo, StepStats
from saekit.report.terminal import terminal_reporter
from saekit.report.trackers import TrackerReporter, check_tracker, tracker_reporter

__all__ = [
    "EvalStats",
    "LayerStats",
    "Lowest",
    "Reporter",
    "Reporters",
    "RunInfo",
    "StepStats",
    "TrackerReporter",
    "check_tracker",
    "terminal_reporter",
    "tracker_reporter",
]
