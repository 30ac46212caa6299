"""A machine's rates as a table."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saekit.planning.calibration import Calibration
from saekit.planning.rates import Rates

BUSY = 0.15
"""Share of the CPU in others' use from which a calibration is doubted."""


def render_rates(calibration: Calibration, console: Console) -> None:
    """Print what a calibration has found, and where it is kept."""
    for name, rates in calibration.found.items():
        shown = Table(box=None, pad_edge=False, title=name, title_justify="left", title_style="bold")
        shown.add_column("measured")
        shown.add_column("", justify="right")
        shown.add_column("")
        for row in _rows(rates):
            shown.add_row(*row)
        console.print(shown)
    if calibration.busy > BUSY:
        said = f"Others used {calibration.busy:.0%} of the CPU: measure again when it is idle, the rates are too low."
        console.print(Text(said, style="yellow"), soft_wrap=True)
    console.print(Text(f"Kept in {calibration.file}\n", style="dim"), soft_wrap=True)


def _rows(rates: Rates) -> Iterator[tuple[str, str, str]]:
    for name, rate in rates.matmul.items():
        yield f"matmul {name}", f"{rate / 1e12:,.2f}", "10¹² operations/s"
    yield "memory", f"{rates.bandwidth / 1e9:,.1f}", "GB/s read and written by a copy"
    for name, seconds in rates.block.items():
        yield f"a block {name}", f"{seconds * 1e9:,.1f}", "ns per token and dimension, besides matmuls"
    for name, cost in rates.passes.items():
        parts = f"{cost.score * 1e9:.2f} N·M + {cost.term * 1e9:.2f} N·k·D + {cost.weight * 1e9:.2f} M·D"
        yield f"SAE {name}", parts, f"ns, and {cost.call * 1e3:.1f} ms, besides the encoder's matmul"
    for name, seconds in rates.update.items():
        yield name, f"{seconds * 1e9:.2f}", "ns per parameter"
    for ranks, network in rates.network.items():
        yield f"all-reduce, {ranks} ranks", f"{network.all_reduce / 1e9:,.2f}", "GB/s sent by each"
        yield f"rank to rank, {ranks} ranks", f"{network.point_to_point / 1e9:,.2f}", "GB/s sent by each"
