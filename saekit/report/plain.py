"""Progress as plain lines, for pipes, log files and CI."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.console import Console

from saekit import units
from saekit.report.pace import Pace
from saekit.report.sparkline import TO_ASCII
from saekit.report.stats import EvalStats, LayerStats, RunInfo, StepStats, ending


class PlainReporter:
    """Writes a line for a report, but not more often than every few seconds, and the last one always.

    No colors, no cursor movements, no characters that a log viewer could choke on.

    Args:
        output: A text stream, or a rich console, whose stream is used directly.
        every: Seconds that lie at least between two lines about steps.
        clock: Seconds that only go forward; tests put their own here.
    """

    def __init__(
        self, output: Console | TextIO, every: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._output = output
        self._every = every
        self._clock = clock
        self._run: tuple[RunInfo, Pace] | None = None
        self._newest: StepStats | None = None
        self._written: StepStats | None = None
        self._written_at = 0.0
        self._saved: int | None = None
        self._note = ""

    def status(self, message: str) -> None:
        """Write the message."""
        self._write(message)

    def start(self, info: RunInfo) -> None:
        """Write what is going to be trained."""
        self._run = (info, Pace(info, self._clock))
        number = len(info.hookpoints)
        what = number if info.coder == "SAE" else units.plural(number, info.coder)
        resumed = f", resumed at step {info.start_step:,}" if info.start_step else ""
        self._write(
            f"training {what} x {info.code} on {info.model} with "
            f"{info.dataset}: {info.total_steps:,} steps of {info.global_batch:,} x {info.ctx_len:,} tokens, "
            f"{info.place}, {info.dtype}, {info.computed_by}, in {info.run_dir}{resumed}"
        )
        if info.layout:
            self._write(f"layers by rank: {info.layout}")

    def step(self, stats: StepStats) -> None:
        """Write the first report, and later ones when the last line is old enough."""
        if self._run is not None:
            self._run[1].update(stats)
        self._newest = stats
        if self._written is None or self._clock() - self._written_at >= self._every:
            self._write_step(stats)

    def evaluated(self, stats: EvalStats) -> None:
        """Write what was found in a few words; `metrics.jsonl` has all of it."""
        if self._run is not None:
            self._run[1].pause(stats)
        self._write(f"evaluated step {stats.step:,} in {units.duration(stats.seconds)} | {' | '.join(stats.summary)}")

    def saved(self, path: Path, step: int) -> None:
        """Write where the checkpoint is."""
        self._saved = step
        self._write(f"saved step {step:,} in {path}")

    def note(self, text: str) -> None:
        """Write the line, unless it is the one before."""
        if text not in ("", self._note):
            self._write(text)
        self._note = text

    def leave(self) -> None:
        """Nothing: what was written stays."""

    def finish(self) -> None:
        """Write the last report, if it was held back, and a table of the layers."""
        stats, self._newest = self._newest, None
        if stats is None:
            return
        if stats is not self._written:
            self._write_step(stats)
        for row in _table(stats.layers, self._run is not None and self._run[0].with_auxk):
            self._write(row)
        if self._run is not None:
            info, pace = self._run
            divergence = f", but {stats.divergence}" if stats.diverged else ""
            self._write(f"{ending(info, stats, self._saved)} {units.duration(pace.seconds_gone())}{divergence}")

    def _write_step(self, stats: StepStats) -> None:
        self._written, self._written_at = stats, self._clock()
        total, rate, left = "?", stats.tokens_per_second, None
        if self._run is not None:
            info, pace = self._run
            total, rate, left = f"{info.total_steps:,}", pace.tokens_per_second or rate, pace.seconds_left()
        parts = [
            f"step {stats.step:,}/{total}",
            f"{units.short_count(stats.tokens)} tokens",
            f"{units.short_count(rate)} tok/s",
            f"ETA {units.duration(left)}",
            f"lr {units.scientific(stats.learning_rate)}",
        ]
        if stats.layers:
            worst = stats.worst
            dead = sum(one.dead for one in stats.layers.values()) / sum(
                one.num_latents for one in stats.layers.values()
            )
            parts += [
                f"FVU {units.decimal(stats.mean_fvu)}",
                f"worst {worst} {units.decimal(stats.layers[worst].fvu)}",
                f"dead {units.percent(dead)}",
            ]
        if stats.skipped_steps:
            parts.append(f"{stats.skipped_steps:,} skipped")
        if stats.diverged:
            parts.append(stats.divergence)
        self._write(" | ".join(parts))

    def _write(self, text: str) -> None:
        stream = self._output.file if isinstance(self._output, Console) else self._output
        encoding = getattr(stream, "encoding", None) or "utf-8"
        # A model or folder may be named in characters that the stream's encoding lacks.
        safe = text.translate(TO_ASCII).encode(encoding, "backslashreplace").decode(encoding)
        stream.write(safe + "\n")
        stream.flush()


def _table(layers: dict[str, LayerStats], with_auxk: bool) -> list[str]:
    width = max([len("layer"), *map(len, layers)])
    rows = [f"{'layer':<{width}}  {'FVU':>8}  {'dead':>9}  {'':>6}  {'L0':>7}" + ("      AuxK" if with_auxk else "")]
    for name, layer in layers.items():
        auxk = f"  {units.decimal(layer.auxk_loss):>8}" if with_auxk else ""
        rows.append(
            f"{name:<{width}}  {units.decimal(layer.fvu):>8}  {layer.dead:>9,}  {units.percent(layer.dead_fraction):>6}"
            f"  {units.decimal(layer.l0, 1):>7}{auxk}"
        )
    return rows
