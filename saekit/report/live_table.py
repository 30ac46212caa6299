"""The live view's table of layers: on a narrow terminal it has fewer columns, never names cut to look alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from saekit import units
from saekit.report.sparkline import sparkline
from saekit.report.stats import LayerStats, Lowest, RunInfo, worst
from saekit.text import least_width, shorten, that_fits

TREND_REPORTS = 24
"""Reports that a trend shows, the newest last."""

ALL_LAYERS = ""
"""Key of the mean over layers in `LiveState.trends`; no hookpoint is called that."""

WIDE_ENOUGH_FOR_RANKS = 66
"""Columns of the terminal from which a layer map's ranks are shown."""

GAP = 2
"""Blanks between two columns."""
TREND, WIDE_TREND = "FVU trend", "FVU trend (log, own scale)"
SHORT_NAME = len("layers.10")
"""Names of layers are not cut below this as long as there is another column to drop."""


@dataclass(frozen=True)
class Row:
    """What a row shows of a layer, or of all of them."""

    layer: LayerStats | None
    """None before the first report."""
    rank: str
    trend: Sequence[float]
    diverged: bool = False


@dataclass(frozen=True)
class Column:
    """A column that can be dropped."""

    heading: str
    width: int
    cell: Callable[[Row], str | Text]


def _numbers(show: Callable[[LayerStats], str | Text]) -> Callable[[Row], str | Text]:
    return lambda row: units.UNKNOWN if row.layer is None else show(row.layer)


def _fvu(row: Row) -> str | Text:
    if row.layer is None:
        return units.UNKNOWN
    bad = row.diverged or units.unknown(row.layer.fvu)
    digits = 4 if row.layer.fvu < 100 else 2  # 1234.57 is as wide as there is room
    return Text(units.decimal(row.layer.fvu, digits), "bold red" if bad else "")


def _worry(layer: LayerStats) -> str:
    return "red" if layer.dead_fraction >= 0.5 else "yellow" if layer.dead_fraction >= 0.1 else ""


def _dead(layer: LayerStats) -> Text:
    return Text(units.count(layer.dead) if layer.dead < 1_000_000 else units.short_count(layer.dead), _worry(layer))


RANK = Column("rank", 4, lambda row: row.rank)
FVU = Column("FVU", 7, _fvu)
DEAD = Column("dead", 7, _numbers(_dead))
SHARE = Column("", 5, _numbers(lambda layer: Text(units.percent(layer.dead_fraction), _worry(layer) or "dim")))
SHARE_ALONE = Column("dead", 5, SHARE.cell)
L0 = Column("L0", 5, _numbers(lambda layer: units.decimal(layer.l0, 1 if layer.l0 < 1000 else 0)))
AUXK = Column("AuxK", 6, _numbers(lambda layer: units.decimal(layer.auxk_loss, 3)))
ORDER = (RANK, FVU, DEAD, SHARE, SHARE_ALONE, L0, AUXK)


@dataclass(frozen=True)
class Layout:
    """What fits into a terminal's width."""

    name: int
    """Columns of the terminal that the names take."""
    columns: tuple[Column, ...]
    trend: int
    """Those that the trend takes; 0 without one."""


def lay_out(info: RunInfo, width: int) -> Layout:
    """Choose columns by what matters most to somebody who watches: FVU, dead latents, the trend, then the rest.

    Args:
        info: The run.
        width: Columns of the terminal.
    """
    longest = max(len("layer"), len(_all(info)), *map(len, info.hookpoints))
    name = min(longest, max(SHORT_NAME, least_width(info.hookpoints)))
    left = width - name - GAP - FVU.width
    if left < 0:
        return Layout(max(1, name + left), (FVU,), 0)
    ranks = [RANK] if info.owners and width >= WIDE_ENOUGH_FOR_RANKS else []
    auxk = [AUXK] if info.with_auxk else []
    chosen, trend = [FVU], 0
    for column in (*ranks, SHARE, None, DEAD, L0, *auxk):
        needs = GAP + (len(TREND) if column is None else column.width)
        if needs <= left:
            left -= needs
            if column is None:
                trend = len(TREND)
            else:
                chosen.append(column)
    if DEAD not in chosen:  # whose heading is above both
        chosen = [SHARE_ALONE if column is SHARE else column for column in chosen]
    more = min(longest - name, left)  # whole names first, then a longer trend
    trend = min(len(WIDE_TREND), trend + left - more) if trend else 0
    return Layout(name + more, tuple(sorted(chosen, key=ORDER.index)), trend)


def _all(info: RunInfo) -> str:
    return f"all {len(info.hookpoints)}"


def layers_table(
    info: RunInfo,
    layers: Mapping[str, LayerStats],
    trends: Mapping[str, Sequence[float]],
    diverged: Mapping[str, Lowest | None],
    width: int,
    room: int,
) -> list[RenderableType]:
    """The table, and below it a line about the layers there was no room for.

    Args:
        info: The run.
        layers: The newest report's; empty before the first.
        trends: FVUs by hookpoint, and under `ALL_LAYERS`.
        diverged: See `StepStats.diverged`.
        width: Columns of the terminal.
        room: Lines, without the heading.
    """
    names = info.hookpoints
    with_mean = len(names) > 1
    fits = len(names) + with_mean <= room
    shown = [names[row] for row in spread(len(names), max(0, room - with_mean - (not fits)))]
    layout = lay_out(info, width)

    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("layer", width=layout.name, no_wrap=True, overflow="ellipsis")
    for column in layout.columns:
        table.add_column(column.heading, width=column.width, justify="right", no_wrap=True)
    if layout.trend:
        title = WIDE_TREND if layout.trend >= len(WIDE_TREND) else TREND
        table.add_column(title, min_width=layout.trend, no_wrap=True, overflow="crop", style="cyan")

    def add(name: str, row: Row, style: str = "") -> None:
        trend = [sparkline(row.trend, min(layout.trend, TREND_REPORTS))] if layout.trend else []
        # As a Text, a name in brackets is no markup.
        table.add_row(Text(name), *(column.cell(row) for column in layout.columns), *trend, style=style)

    short = dict(zip(names, shorten(names, layout.name), strict=True))
    for name in shown:
        rank = str(info.owners[name]) if info.owners else ""
        add(short[name], Row(layers.get(name), rank, trends.get(name, ()), name in diverged))
    if with_mean:
        add(_all(info), Row(mean_layer(list(layers.values())), "", trends.get(ALL_LAYERS, ())), "bold")
    if fits:
        return [table]
    return [table, _not_shown({name: layer for name, layer in layers.items() if name not in shown}, width)]


def spread(n: int, room: int) -> list[int]:
    """Which `room` of `n` rows to show: evenly spread, the first and the last among them, the same ones each time."""
    if n <= room:
        return list(range(n))
    if room <= 1:
        return [0][:room]
    return [round(i * (n - 1) / (room - 1)) for i in range(room)]


def mean_layer(layers: Sequence[LayerStats]) -> LayerStats | None:
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


def _not_shown(layers: Mapping[str, LayerStats], width: int) -> Text:
    """Sum up the layers between those that are shown, in the words that fit."""
    if not layers:
        return Text("… more layers than fit", "dim", no_wrap=True, overflow="ellipsis")
    mean = units.decimal(fmean(layer.fvu for layer in layers.values()))
    name = worst({name: layer.fvu for name, layer in layers.items()})
    bad = f"worst {name} {units.decimal(layers[name].fvu)}"
    said = (
        f"… and {len(layers)} layers in between: mean FVU {mean}, {bad}",
        f"… {len(layers)} in between: {bad}",
        f"… {bad}",
    )
    return Text(that_fits(said, width), "dim", no_wrap=True, overflow="ellipsis")
