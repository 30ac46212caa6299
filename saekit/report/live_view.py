"""Draws the live view: a function from the state of a run to something that rich can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from saekit import units
from saekit.report.live_table import ALL_LAYERS, TREND_REPORTS, layers_table
from saekit.report.pace import Pace
from saekit.report.stats import EvalStats, RunInfo, StepStats, ending
from saekit.text import tail, wrap

ROOMY = 20
"""Terminal lines from which the view has blank lines and its whole header."""

DOT = " · "
LEAST_BAR = 8
"""Columns of a bar of progress that is worth its room."""

Piece = tuple[str | Text, int]
"""A part of a line, and the columns that it takes."""


@dataclass(frozen=True)
class LiveState:
    """All that the view shows. Immutable, because the refresh thread reads it while training replaces it."""

    info: RunInfo
    pace: Pace
    stats: StepStats | None = None
    """The newest report; None before the first one."""
    trends: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """FVU of the last `TREND_REPORTS` reports by hookpoint, and their mean over layers under `ALL_LAYERS`."""
    evaluation: EvalStats | None = None
    """The newest one."""
    saved: tuple[Path, int] | None = None
    """Folder and step of the newest checkpoint."""
    note: str = ""
    """A line about the process that trains, for those who watch from another one."""
    finished: bool = False

    def after(self, stats: StepStats) -> LiveState:
        """Return the state once `stats` has been reported."""
        fvus = {hookpoint: layer.fvu for hookpoint, layer in stats.layers.items()}
        if fvus:
            fvus[ALL_LAYERS] = fmean(fvus.values())
        trends = {name: (*self.trends.get(name, ()), fvu)[-TREND_REPORTS:] for name, fvu in fvus.items()}
        return replace(self, stats=stats, trends=trends)


def run_view(state: LiveState, width: int, height: int) -> RenderableType:
    """The whole view, in at most `height` lines of `width` columns, unless the run has finished: then every layer.

    Args:
        state: What to show.
        width: Columns of the terminal.
        height: Lines of the terminal.
    """
    info, stats = state.info, state.stats
    roomy = height >= ROOMY
    above: list[RenderableType] = [*_header(info, width)] if roomy else [_header(info, width)[0]]
    blank = [Text()] if roomy else []
    evaluation = [_evaluation(state, width)] if info.eval_every or state.evaluation else []
    above += [*blank, _progress(state, width), _numbers(state, width), *evaluation, *blank]
    below: list[RenderableType] = [*blank, _saved(state, width)]
    if state.note:
        below += _lines(f"! {state.note}", "yellow", width)
    if stats is not None and stats.diverged:
        below += _lines(f"✗ {stats.divergence}", "bold red", width)
    # The table's own heading takes one line, and the terminal's last line stays free.
    room = len(info.hookpoints) + 2 if state.finished else height - len(above) - len(below) - 2
    layers, diverged = (stats.layers, stats.diverged) if stats is not None else ({}, {})
    return Group(*above, *layers_table(info, layers, state.trends, diverged, width, room), *below)


def line(*parts: str | tuple[str, str]) -> Text:
    """One line that is cut off at the terminal's edge, never wrapped."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _lines(text: str, style: str, width: int) -> list[Text]:
    return [line((part, style)) for part in wrap(text, width, "  ").split("\n")]


def joined(parts: Sequence[str | Text], width: int) -> Text:
    """One line of as many parts as fit, with dots between them; the first is cut off if even that one is too long."""
    shown = line()
    for part in parts:
        if shown and shown.cell_len + len(DOT) + len(part) > width:
            break
        shown.append(DOT if shown else "", "dim").append(part)
    return shown


def _header(info: RunInfo, width: int) -> list[Text]:
    what = "layer" if info.coder == "SAE" else info.coder
    shape = f"{units.plural(len(info.hookpoints), what)} × {info.code}"
    parts = [shape, f"width {info.width}", f"{info.place}, {info.dtype}", info.computed_by]
    batch = f"{info.global_batch:,} × {info.ctx_len:,} tokens per step"
    if len(DOT.join([*parts, batch])) <= width:
        parts.append(batch)
    # What does not fit into one line comes into two, with where it runs in the second.
    rows = [parts] if len(DOT.join(parts)) <= width else [parts[:2], parts[2:]]
    return [
        line(("saekit  ", "bold cyan"), (info.model, "bold"), (" on ", "dim"), (info.dataset, "bold")),
        *(joined(row, width) for row in rows),
        line((tail(str(info.run_dir), width), "dim")),
    ]


def _progress(state: LiveState, width: int) -> Table:
    step = state.stats.step if state.stats else state.info.start_step
    total = state.info.total_steps
    label, seconds = "ETA ", state.pace.seconds_left()
    if state.finished:
        how = ending(state.info, state.stats, state.saved[1] if state.saved else None)
        label, seconds = f"{how} ", state.pace.seconds_gone()
    time = Text.assemble((label, "dim"), units.duration(seconds))
    count, share = f"{step:,}/{total:,}", f"{100 * step / max(total, 1):.1f}%"
    # Widths that do not change as the numbers grow keep the bar's length steady.
    steps = (f"{count} steps", len(f"{total:,}/{total:,} steps"))
    few = (count, len(f"{total:,}/{total:,}"))
    percent, rest = (share, len("100.0%")), (time, max(len("ETA 59m 59s"), len(time)))
    full: list[Piece] = [steps, percent, rest]
    ways: Sequence[tuple[list[Piece], int]]
    ways = [(full, 2 + LEAST_BAR), (full, 0), ([few, percent, rest], 0), ([few, rest], 0)]

    def needs(pieces: list[Piece], bar: int) -> int:
        return sum(columns for _, columns in pieces) + 2 * (len(pieces) - 1) + bar

    shown, with_bar = next((way for way in ways if needs(*way) <= width), ways[-1])
    row = Table.grid(expand=bool(with_bar), padding=(0, 2, 0, 0))
    if with_bar:
        row.add_column(ratio=1)
    for _, columns in shown:
        row.add_column(no_wrap=True, justify="right", min_width=columns)
    bar = ProgressBar(total=max(total, 1), completed=step, complete_style="cyan", finished_style="green")
    row.add_row(*([bar] if with_bar else []), *(each for each, _ in shown))
    return row


def _numbers(state: LiveState, width: int) -> Text:
    stats = state.stats
    if stats is None:
        return line(("waiting for the first report", "dim"))
    tokens = Text.assemble(
        f"{units.short_count(stats.tokens)} tokens",
        (f" of ≤ {units.short_count(state.info.total_tokens)}", "dim"),
    )
    rate = f"{units.short_count(state.pace.tokens_per_second)} tokens/s"
    lr, peak = f"lr {units.scientific(stats.learning_rate)}", f"{units.size(stats.memory_bytes)} peak"
    return joined([tokens, rate, lr, peak], width)


def _evaluation(state: LiveState, width: int) -> Text:
    """Show the newest evaluation, in means over the layers; the line is there from the start."""
    stats = state.evaluation
    if stats is None:
        return line(("not evaluated yet", "dim"))
    return joined([Text(f"evaluated at step {stats.step:,}", "dim"), *stats.summary], width)


def _saved(state: LiveState, width: int) -> Text:
    """Name the newest checkpoint, and how many steps were skipped; the latter must not be cut off."""
    said = ["no checkpoint yet"]
    if state.saved is not None:
        path, step = state.saved
        said = [f"saved step {step:,} in {path.name}", f"saved step {step:,}"]
    skipped = [""]
    if state.stats is not None and (number := state.stats.skipped_steps):
        skipped = [f"{number:,} of {state.stats.step:,} steps skipped: NaN or Inf", f"{number:,} skipped (NaN)"]
    mark = "✓ " if state.saved is not None else ""
    ways = [(text, bad) for bad in skipped for text in said]
    text, bad = next((way for way in ways if len(mark + DOT.join(filter(None, way))) <= width), ways[-1])
    return line((mark, "green"), (text, "dim"), (DOT if bad else "", "dim"), (bad, "yellow"))
