"""The run's record in `metrics.jsonl`: one JSON object per report and evaluation, and for its start and its end."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

from saekit.errors import UserError
from saekit.report.stats import EvalStats, LayerStats, RunInfo, StepStats
from saekit.runs.files import write_at_once
from saekit.runs.folder import way_on

EVALUATION, START, END = "evaluation", "start", "end"
"""Kinds of records: of an evaluation, and of the start and the end of each process that trained the run. Reports name
none."""


class JsonlReporter:
    """Appends one line per report or evaluation and flushes it: a killed run loses at most the line being written.

    A run that starts afresh empties the file. A resumed run first drops the lines of steps it is going to repeat, so
    each step stands there once.

    Args:
        path: The file, usually `RUN/metrics.jsonl`; its folder is made when training starts.
        on_trouble: Told, once, when the disk takes no more lines, which are kept and written as soon as it does; None
            ends the run instead.
    """

    def __init__(self, path: Path, on_trouble: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self.on_trouble = on_trouble
        self._file: BinaryIO | None = None
        self._step = 0
        """Of the newest record."""
        self._pending = b""
        """Lines that the disk did not take yet."""

    def status(self, message: str) -> None:
        """Nothing: the file holds numbers only."""

    def start(self, info: RunInfo) -> None:
        """Bring the file to the state it had at `info.start_step`, and add what is known of the run."""
        self._close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_up_to(self.path, info.start_step) if info.start_step > 0 and self.path.exists() else ""
        write_at_once(self.path, kept + _as_line(as_start(info, time.time())))
        self._step, self._pending = info.start_step, b""
        self._file = self.path.open("ab", buffering=0)

    def step(self, stats: StepStats) -> None:
        """Write one line.

        Raises:
            UserError: If it cannot be written, and no function was given to warn instead.
        """
        self._step = stats.step
        self._append(as_record(stats, time.time()))

    def evaluated(self, stats: EvalStats) -> None:
        """Write one line of its own.

        Raises:
            UserError: As `step`.
        """
        self._append(as_evaluation(stats, time.time()))

    def _append(self, record: dict[str, Any]) -> None:
        in_trouble = bool(self._pending)
        self._pending += _as_line(record).encode()
        try:
            self._write()
        except OSError as error:
            trouble = f"{self.path} cannot be written ({error.strerror})"
            if self.on_trouble is None:
                self._pending = b""
                raise UserError(f"{trouble}; {way_on(self.path.parent)}") from None
            if not in_trouble:
                self.on_trouble(f"Warning: {trouble}; its lines stay in memory until they can be written")

    def _write(self) -> None:
        assert self._file is not None, "`start` comes before reports"
        end = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(self._pending)
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            # The part of a line that did get there would spoil the one after it.
            with suppress(OSError):
                self._file.truncate(end)
            raise
        self._pending = b""

    def saved(self, path: Path, step: int) -> None:
        """Nothing: the checkpoint speaks for itself."""

    def finish(self) -> None:
        """Write that the run has ended here, and close the file."""
        if self._file is not None:
            self._pending += _as_line({"kind": END, "step": self._step, "time": time.time()}).encode()
            with suppress(OSError):  # how the run has ended is more important than that it is not written here
                self._write()
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _as_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def as_start(info: RunInfo, now: float) -> dict[str, Any]:
    """Describe a run at the moment a process begins to train it, as JSON types.

    Args:
        info: The run.
        now: Unix time, in seconds.

    Returns:
        `kind`, which is "start"; `step`, the first one or that of the checkpoint the run resumes from; `time`; and as
        `run` the fields of `RunInfo`, without the folder and the configuration, which is next to this file.
    """
    run = {each.name: getattr(info, each.name) for each in fields(info) if each.name not in ("run_dir", "config")}
    return {"kind": START, "step": info.start_step, "time": now, "run": plain(run)}


def as_record(stats: StepStats, now: float) -> dict[str, Any]:
    """One report as JSON types.

    Args:
        stats: The report.
        now: Unix time, in seconds.

    Returns:
        The fields of `StepStats` flat, with `time`; `diverged` has a pair of FVU and step, or None; `layers` maps each
        hookpoint to the fields of `LayerStats` and its `dead_fraction`. JSON has no NaN and no infinity: they become
        None.
    """
    return {
        "step": stats.step,
        "tokens": stats.tokens,
        "tokens_per_second": finite(stats.tokens_per_second),
        "learning_rate": finite(stats.learning_rate),
        "memory_bytes": stats.memory_bytes,
        "skipped_steps": stats.skipped_steps,
        "bad_in_row": stats.bad_in_row,
        "diverged": plain(stats.diverged),
        "time": now,
        "layers": {hookpoint: _layer_record(layer) for hookpoint, layer in stats.layers.items()},
    }


def as_evaluation(stats: EvalStats, now: float) -> dict[str, Any]:
    """One evaluation as JSON types.

    Args:
        stats: The evaluation.
        now: Unix time, in seconds.

    Returns:
        `kind`, which is "evaluation" and which no report has; `step`, `seconds` and `time`; and as `evaluation` what
        `eval.json` holds of the layers. NaN and infinity become None.
    """
    return {
        "kind": EVALUATION,
        "step": stats.step,
        "seconds": finite(stats.seconds),
        "time": now,
        "evaluation": plain(stats.record),
    }


def plain(value: Any) -> Any:
    """As JSON types: paths as strings, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    return str(value) if isinstance(value, Path) else value


def finite(value: float | None) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Read the reports in a metrics file, or its evaluations, in the order in which they were written.

    Args:
        path: A file that `JsonlReporter` wrote.
        kind: None for reports, `EVALUATION` for evaluations, or `START` or `END`.

    Raises:
        UserError: See `read_records`.
    """
    return [record for record in read_records(path) if record.get("kind") == kind]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read all records of a metrics file, of every kind, in the order in which they were written.

    A last line that was torn off by a crash is left out.

    Returns:
        One dictionary for each, see `as_record`, `as_evaluation` and `as_start`.

    Raises:
        UserError: If any other line is not a record: the file was damaged or is no metrics file.
    """
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        record = parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise UserError(f"{path}, line {number}: this line is not a record; remove the line or the file")
    return records


def _lines_up_to(path: Path, step: int) -> str:
    """The file's whole records of steps up to `step`; what cannot be read is dropped, so a run can always go on."""
    return "".join(line + "\n" for line, record in _records(path) if record["step"] <= step)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in path.read_bytes().splitlines():
        record = parse(line)
        if record is not None:
            yield line.decode("utf-8"), record


def parse(line: bytes) -> dict[str, Any] | None:
    """Return a line's record; None if the line holds none."""
    try:
        record = json.loads(line)
    except ValueError:  # also what undecodable bytes raise
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _layer_record(layer: LayerStats) -> dict[str, float | int | None]:
    return {
        "fvu": finite(layer.fvu),
        "l0": finite(layer.l0),
        "dead": layer.dead,
        "dead_fraction": layer.dead_fraction,
        "num_latents": layer.num_latents,
        "loss": finite(layer.loss),
        "auxk_loss": finite(layer.auxk_loss),
        "multi_topk_fvu": finite(layer.multi_topk_fvu),
        "too_long": finite(layer.too_long),
    }
