"""Draws the live view: a function from the state of a run to something that rich can show."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from saekit import units
from saekit.report.sparkline import sparkline
from saekit.report.stats import EvalStats, LayerStats, Pace, RunInfo, StepStats

TREND_REPORTS = 24
"""Reports that a trend shows, the newest last."""

ALL_LAYERS = ""
"""Key of the mean over layers in `LiveState.trends`; no hookpoint is called that."""

WIDE_ENOUGH_FOR_RANKS = 66
"""Columns of the terminal from which a layer map's ranks are shown."""

ROOMY = 20
"""Terminal lines from which the view has blank lines and its whole header."""


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
    roomy = height >= ROOMY
    above: list[RenderableType] = [*_header(state.info, width)] if roomy else [_header(state.info, width)[0]]
    blank = [Text()] if roomy else []
    evaluation = [_evaluation(state)] if state.info.eval_every or state.evaluation else []
    above += [*blank, _progress(state), _numbers(state), *evaluation, *blank]
    below: list[RenderableType] = [*blank, _saved(state)]
    # The table's own heading takes one line, and the terminal's last line stays free.
    room = height - len(above) - len(below) - 2
    return Group(*above, *_layers(state, width, len(state.info.hookpoints) + 2 if state.finished else room), *below)


def spread(n: int, room: int) -> list[int]:
    """Which `room` of `n` rows to show: evenly spread, the first and the last among them, the same ones each time."""
    if n <= room:
        return list(range(n))
    if room <= 1:
        return [0][:room]
    return [round(i * (n - 1) / (room - 1)) for i in range(room)]


def line(*parts: str | tuple[str, str]) -> Text:
    """One line that is cut off at the terminal's edge, never wrapped."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _header(info: RunInfo, width: int) -> list[Text]:
    shape = f"{units.plural(len(info.hookpoints), 'layer')} × {info.code}"
    parts = [shape, f"width {info.width}", f"{info.place}, {info.dtype}", info.computed_by]
    batch = f"{info.global_batch:,} × {info.ctx_len:,} tokens a step"
    if len(" · ".join([*parts, batch])) <= width:
        parts.append(batch)
    # What does not fit into one line comes into two, with where it runs in the second.
    rows = [parts] if len(" · ".join(parts)) <= width else [parts[:2], parts[2:]]
    return [
        line(("saekit  ", "bold cyan"), (info.model, "bold"), (" on ", "dim"), (info.dataset, "bold")),
        *(line(" · ".join(row)) for row in rows),
        line((str(info.run_dir), "dim")),
    ]


def _progress(state: LiveState) -> Table:
    step = state.stats.step if state.stats else state.info.start_step
    total = state.info.total_steps
    if not state.finished:
        label, seconds = "ETA ", state.pace.seconds_left()
    else:
        label, seconds = "done in " if step >= total else "stopped after ", state.pace.seconds_gone()
    row = Table.grid(expand=True, padding=(0, 2, 0, 0))
    row.add_column(ratio=1)
    # Widths that do not change as the numbers grow keep the bar's length steady.
    for columns in (len(f"{total:,}/{total:,} steps"), len("100.0%"), len("ETA 59m 59s")):
        row.add_column(no_wrap=True, justify="right", min_width=columns)
    bar = ProgressBar(total=max(total, 1), completed=step, complete_style="cyan", finished_style="green")
    time_left = Text.assemble((label, "dim"), units.duration(seconds))
    row.add_row(bar, f"{step:,}/{total:,} steps", f"{100 * step / max(total, 1):.1f}%", time_left)
    return row


def _numbers(state: LiveState) -> Text:
    stats = state.stats
    if stats is None:
        return line(("waiting for the first report", "dim"))
    dot = (" · ", "dim")
    return line(
        f"{units.short_count(stats.tokens)} tokens",
        (f" of ≤ {units.short_count(state.info.total_tokens)}", "dim"),
        dot,
        f"{units.short_count(state.pace.tokens_per_second)} tokens/s",
        dot,
        f"lr {units.scientific(stats.learning_rate)}",
        dot,
        f"{units.size(stats.memory_bytes)} peak",
    )


def _evaluation(state: LiveState) -> Text:
    """Show the newest evaluation, in means over the layers; the line is there from the start."""
    stats = state.evaluation
    if stats is None:
        return line(("not evaluated yet", "dim"))
    dot = (" · ", "dim")
    found = [part for each in stats.summary for part in (dot, each)]
    return line((f"evaluated at step {stats.step:,}", "dim"), *found)


def _layers(state: LiveState, width: int, room: int) -> list[RenderableType]:
    """The table, and below it a line about the layers there was no room for; `room` lines without the heading."""
    names = state.info.hookpoints
    layers = dict(state.stats.layers) if state.stats else {}
    with_mean = len(names) > 1
    fits = len(names) + with_mean <= room
    rows = spread(len(names), max(0, room - with_mean - (not fits)))
    owners = state.info.owners if width >= WIDE_ENOUGH_FOR_RANKS else {}
    headings = [("FVU", 7), ("dead", 7), ("", 5), ("L0", 5), *([("AuxK", 6)] if state.info.with_auxk else [])]
    # A gap of two behind every column but the last, the trend; the layers' ranks take six.
    taken = 2 + sum(columns + 2 for _, columns in headings) + 6 * bool(owners)
    longest = max(len("layer"), *map(len, names), len(f"all {len(names)}"))
    name_width = min(longest, max(len("layers.10"), width - taken - len("FVU trend")))
    trend_room = width - name_width - taken
    trend_width = max(4, min(TREND_REPORTS, trend_room))
    title = "FVU trend (log, own scale)" if trend_room >= len("FVU trend (log, own scale)") else "FVU trend"

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("layer", width=name_width, no_wrap=True, overflow="ellipsis")
    if owners:
        table.add_column("rank", width=4, justify="right", no_wrap=True)
    for heading, columns in headings:
        table.add_column(heading, width=columns, justify="right", no_wrap=True)
    table.add_column(title, min_width=trend_width, no_wrap=True, overflow="crop", style="cyan")
    for name in (names[row] for row in rows):
        table.add_row(
            # As a Text, a name in brackets is no markup.
            Text(units.tail(name, name_width)),
            *([str(owners[name])] if owners else []),
            *_cells(layers.get(name))[: len(headings)],
            sparkline(state.trends.get(name, ()), trend_width),
        )
    if with_mean:
        trend = sparkline(state.trends.get(ALL_LAYERS, ()), trend_width)
        blank = [""] if owners else []
        table.add_row(
            f"all {len(names)}",
            *blank,
            *_cells(mean_layer(list(layers.values())))[: len(headings)],
            trend,
            style="bold",
        )
    if fits:
        return [table]
    shown = {names[row] for row in rows}
    return [table, _not_shown({name: layer for name, layer in layers.items() if name not in shown})]


def mean_layer(layers: list[LayerStats]) -> LayerStats | None:
    """Means over layers, and sums of the counts; None of nothing."""
    if not layers:
        return None
    return LayerStats(
        fvu=fmean(layer.fvu for layer in layers),
        l0=fmean(layer.l0 for layer in layers),
        dead=sum(layer.dead for layer in layers),
        num_latents=sum(layer.num_latents for layer in layers),
        loss=fmean(layer.loss for layer in layers),
        auxk_loss=fmean(layer.auxk_loss for layer in layers),
    )


def _cells(layer: LayerStats | None) -> list[str | Text]:
    """Return the numbers; AuxK's loss is the last one."""
    if layer is None:
        return [units.UNKNOWN] * 5
    worry = "red" if layer.dead_fraction >= 0.5 else "yellow" if layer.dead_fraction >= 0.1 else ""
    return [
        Text(units.decimal(layer.fvu), "bold red" if units.unknown(layer.fvu) else ""),
        Text(units.count(layer.dead) if layer.dead < 1_000_000 else units.short_count(layer.dead), worry),
        Text(units.percent(layer.dead_fraction), worry or "dim"),
        units.decimal(layer.l0, 1),
        units.decimal(layer.auxk_loss, 3),
    ]


def _not_shown(layers: dict[str, LayerStats]) -> Text:
    if not layers:
        return line(("… more layers than fit", "dim"))
    mean = units.decimal(fmean(layer.fvu for layer in layers.values()))
    worst = max(layers, key=lambda name: (layers[name].fvu != layers[name].fvu, layers[name].fvu))
    rest = f"… and {len(layers)} between these: mean FVU {mean}, worst {worst} {units.decimal(layers[worst].fvu)}"
    return line((rest, "dim"))


def _saved(state: LiveState) -> Text:
    parts = [("no checkpoint yet", "dim")]
    if state.saved is not None:
        path, step = state.saved
        parts = [("✓ ", "green"), (f"saved step {step:,} in {path.name}", "dim")]
    if state.stats is not None and (skipped := state.stats.skipped_steps):
        parts += [(" · ", "dim"), (f"{skipped:,} of {state.stats.step:,} steps skipped: NaN or Inf", "yellow")]
    return line(*parts)
