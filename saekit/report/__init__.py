"""Reporters: who watches a run."""

from saekit.report.base import Reporter, Reporters
from saekit.report.stats import EvalStats, LayerStats, RunInfo, StepStats
from saekit.report.terminal import terminal_reporter
from saekit.report.trackers import TrackerReporter, tracker_reporter

__all__ = [
    "EvalStats",
    "LayerStats",
    "Reporter",
    "Reporters",
    "RunInfo",
    "StepStats",
    "TrackerReporter",
    "terminal_reporter",
    "tracker_reporter",
]
