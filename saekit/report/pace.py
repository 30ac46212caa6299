"""A run's speed, and the time it has left."""

from __future__ import annotations

import time
from collections.abc import Callable

from saekit.report.stats import EvalStats, RunInfo, StepStats


class Pace:
    """Smoothed speed, and the time left by the steps still to do.

    Steps, not tokens, measure progress: excluded tokens are not counted, so tokens done never reach the tokens read.
    Both averages are exponential. They start as plain means, so that a slow first report (compilation, calibration)
    does not weigh on the estimate for long. Evaluations count by themselves: the next will take what the last one took.

    Args:
        info: The run; its `start_step` is where this session began.
        clock: Seconds that only go forward; tests put their own here.
    """

    newest_weight = 0.2
    """Share of the newest report in the averages, once there are five."""

    def __init__(self, info: RunInfo, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total_steps = info.total_steps
        self._eval_every = info.eval_every
        self._seconds_per_evaluation = 0.0
        self._began = self._last = clock()
        self._step = info.start_step
        self._reports = 0
        self._seconds_per_step = 0.0
        self.tokens_per_second: float | None = None
        """Smoothed tokens per second; None before the first report."""

    def update(self, stats: StepStats) -> None:
        """Take in the newest report."""
        now = self._clock()
        self._reports += 1
        weight = max(self.newest_weight, 1 / self._reports)
        if stats.step > self._step:
            newest = (now - self._last) / (stats.step - self._step)
            self._seconds_per_step += weight * (newest - self._seconds_per_step)
        rate = stats.tokens_per_second
        before = rate if self.tokens_per_second is None else self.tokens_per_second
        self.tokens_per_second = before + weight * (rate - before)
        self._step, self._last = stats.step, now

    def pause(self, stats: EvalStats) -> None:
        """Take in an evaluation, for which the steps had to wait."""
        self._last += stats.seconds
        self._seconds_per_evaluation = stats.seconds

    def _evaluations_left(self) -> int:
        """Count the evaluations to come: every `eval_every` steps, and after the last one."""
        if self._eval_every is None or self._step >= self._total_steps:
            return 0
        odd = self._total_steps % self._eval_every > 0
        return self._total_steps // self._eval_every - self._step // self._eval_every + odd

    def seconds_left(self) -> float | None:
        """Estimated seconds until the last step, counting down between reports; None before the first report."""
        if self._reports == 0:
            return None
        left = (self._total_steps - self._step) * self._seconds_per_step
        left += self._evaluations_left() * self._seconds_per_evaluation
        return max(0.0, left - (self._clock() - self._last))

    def seconds_gone(self) -> float:
        """Return seconds since this session's training began."""
        return self._clock() - self._began
