"""Which hookpoints, or which of two models, a crosscoder's latents belong to, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from saekit import units
from saekit.analysis.sharing import RELATIVE_BINS, WRITTEN, Sharing
from saekit.report.sparkline import bars

ROWS = 4
"""Height of the large histogram."""
COLUMNS = 2
"""Characters per bin of it."""
RELATIVE = "relative decoder norm ‖other‖ / (‖first‖ + ‖other‖): 0 is the first model only, 1 the other only"


def render_sharing(found: Sharing, num_latents: int) -> RenderableType:
    """Show how many latents are written to how many hookpoints, and what each hookpoint has of them."""
    several = _table()
    several.add_column("written to", justify="right", no_wrap=True)
    several.add_column("latents", justify="right", no_wrap=True)
    several.add_column("", no_wrap=True)
    most = max(1, *found.latents)
    for count, latents in enumerate(found.latents, start=1):
        bar = Text("█" * round(24 * latents / most), "cyan")
        several.add_row(f"{count}" if count < len(found.latents) else f"all {count}", tally(latents, num_latents), bar)
    each = _table()
    each.add_column("hookpoint", overflow="fold", min_width=len("layers.0"))
    each.add_column("median norm", justify="right", no_wrap=True)
    each.add_column("its own latents", justify="right", no_wrap=True)
    for part in found.parts:
        each.add_row(part.hookpoint, units.decimal(part.median, 3), tally(part.own, num_latents))
    scale = "all hookpoints scaled to one variance" if found.by_variance else "relative to each hookpoint's rms"
    note = f"written to: decoder norm at least {WRITTEN:g} of the latent's largest; norms: {scale}"
    histogram = () if found.relative is None else (Text(), *_histogram(found.relative))
    return Group(several, Text(), each, *histogram, Text(note, "dim"))


def _histogram(relative: tuple[int, ...]) -> list[Text]:
    wide = [count for count in relative for _ in range(COLUMNS)]
    half = RELATIVE_BINS * COLUMNS // 2
    rows = [Text(row, "cyan", no_wrap=True) for row in bars(wide, ROWS)]
    axis = "├" + "─" * (half - 1) + "┼" + "─" * (half - 2) + "┤"
    labels = f"{'0':<{half}}{'0.5':<{half - 1}}1"
    note = f"{RELATIVE}; highest bar {max(wide):,} latents"
    return [*rows, Text(axis, "dim", no_wrap=True), Text(labels, "dim", no_wrap=True), Text(note, "dim"), Text()]


def render_relative(layers: Mapping[str, Sharing]) -> RenderableType:
    """Show how many latents of crosscoders of two models are shared, or one model's own.

    Args:
        layers: By hookpoint.
    """
    table = _table()
    table.add_column("layer", overflow="fold", min_width=len("layers.0"))
    for name in ("first's own", "shared", "other's own"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"{'0':<{RELATIVE_BINS // 2}}{'0.5':<{RELATIVE_BINS // 2 - 1}}1", style="cyan", no_wrap=True)
    for name, found in layers.items():
        first, other = (part.own for part in found.parts)
        count = sum(found.latents)
        shown = bars(found.relative or ())[0]
        table.add_row(name, *(tally(number, count) for number in (first, found.latents[1], other)), shown)
    note = f"{RELATIVE}; shared: the smaller decoder norm is at least {WRITTEN:g} of the larger"
    return Group(table, Text(), Text(note, "dim"))


def _table() -> Table:
    return Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")


def tally(part: int | None, whole: int) -> str:
    """Return a number of latents and their share."""
    return units.UNKNOWN if part is None else f"{units.count(part)} ({units.percent(part / whole if whole else None)})"
