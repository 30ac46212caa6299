"""The view of `saekit inspect`: a table of the layers, or one layer in detail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from saekit import units
from saekit.activations.patterns import fold
from saekit.analysis.inspect import Inspection, LayerInspection
from saekit.analysis.measure import BINS_PER_DECADE, DENSITY_DECADES, DUPLICATE_COSINE
from saekit.report.sparkline import TO_ASCII, bars, sparkline
from saekit.sae.storage import IN
from saekit.views.evaluation import evaluation_tables
from saekit.views.sharing import render_relative, render_sharing, tally

HISTOGRAM_ROWS = 4
BIN_COLUMNS = 2
"""Characters per bin of the large histogram."""


def render_inspection(inspection: Inspection, console: Console) -> None:
    """Print an inspection: a table, or for a single layer all there is to know about it."""
    layers = inspection.layers
    body = _detail(layers[0], console.width) if len(layers) == 1 else _overview(layers, console.width)
    picture = Group(_origin(inspection), Text(), body, *_evaluation(inspection))
    if not console.options.ascii_only:
        console.print(picture)
        return
    with console.capture() as captured:
        console.print(picture)
    console.file.write(captured.get().translate(TO_ASCII))


def _origin(inspection: Inspection) -> Table:
    """Return where it comes from: path, model, dataset, how far it was trained."""
    trained = []
    if inspection.step is not None:
        of = "" if inspection.total_steps is None else f" of {inspection.total_steps:,}"
        trained.append(f"step {inspection.step:,}{of}")
    if inspection.tokens is not None:
        trained.append(f"{units.short_count(inspection.tokens)} tokens")
    if inspection.ctx_len is not None:
        trained.append(f"sequences of {inspection.ctx_len:,}")
    if inspection.saekit_version is not None:
        trained.append(f"saekit {inspection.saekit_version}")
    layers = inspection.layers
    shape = (
        f"{len(layers)} × {_range(layers, lambda one: one.num_latents)} latents · "
        f"k {_range(layers, lambda one: one.k)} · {_widths(layers)} · "
        f"{'/'.join(dict.fromkeys(one.activation or units.UNKNOWN for one in layers))}"
    )
    if all(one.skip_norm is not None for one in layers):
        shape += " · with a skip connection"
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    kinds = dict.fromkeys(f"{one.kind}s" for one in layers)
    grid.add_row(
        inspection.kind if inspection.kind != "sae" else layers[0].kind, Text(str(inspection.path), "bold cyan")
    )
    grid.add_row("model", Text(inspection.model or units.UNKNOWN, "bold"))
    if inspection.other_model is not None:
        grid.add_row("other", Text(inspection.other_model, "bold"))
    grid.add_row("dataset", Text(inspection.dataset or units.UNKNOWN, "bold"))
    grid.add_row("trained", " · ".join(trained) or units.UNKNOWN)
    grid.add_row(" and ".join(kinds), Text(shape))
    return grid


def _widths(layers: Sequence[LayerInspection]) -> str:
    read = f"width {_range(layers, lambda one: one.d_in)}"
    if all(one.d_in == one.d_out for one in layers):
        return read
    return f"{read} to {_range(layers, lambda one: one.d_out)}"


def _evaluation(inspection: Inspection) -> tuple[RenderableType, ...]:
    """Show the results of `saekit eval`, if there are any."""
    record = inspection.evaluation
    if record is None:
        return ()
    heading = Text.assemble(
        ("Evaluated", "bold"), f" on {record['dataset']} ({record['data']}), {record['tokens']:,} tokens"
    )
    warnings = (Text.assemble(("Warning: ", "bold yellow"), text) for text in record.get("warnings", ()))
    return (Text(), heading, Text(), *evaluation_tables(record), *warnings)


def _overview(layers: Sequence[LayerInspection], width: int) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    name_width = max(len("layer"), *(len(one.hookpoint) for one in layers))
    # Without the name and the trend, the columns and the gaps between them take 63 characters, or 71.
    with_never = width >= name_width + 71 + 12
    trend_width = max(6, min(24, width - name_width - (71 if with_never else 63)))
    table.add_column("\nlayer", overflow="fold", min_width=len("layers.0"))  # numbers are never cut off
    table.add_column("\nFVU", justify="right", no_wrap=True)
    table.add_column("FVU\ntrend", style="cyan", no_wrap=True)
    table.add_column("\ndead", justify="right", no_wrap=True)
    if with_never:
        table.add_column("never\nfired", justify="right", no_wrap=True)
    table.add_column("firing\nmedian", justify="right", no_wrap=True)
    table.add_column("density\n1e-6       1", style="cyan", no_wrap=True)
    table.add_column("cosine\nmedian", justify="right", no_wrap=True)
    table.add_column("\nmax", justify="right", no_wrap=True)
    table.add_column(f"pairs\n> {DUPLICATE_COSINE}", justify="right", no_wrap=True)
    for one in layers:
        fires, near = one.density, one.neighbours
        table.add_row(
            Text(one.hookpoint),
            Text(units.decimal(one.fvu), "bold"),
            sparkline([fvu for _, fvu in one.trend], trend_width) or units.UNKNOWN,
            _share(one.dead, one.num_latents),
            *([_share(one.never_fired, one.num_latents)] if with_never else []),
            units.scientific(fires.p50 if fires else None),
            bars(_pairs(fires.histogram))[0] if fires else units.UNKNOWN,
            units.decimal(near.median if near else None, 2),
            units.decimal(near.max if near else None, 2),
            _duplicates(one),
        )
    found = {
        one.hookpoint: one.sharing for one in layers if one.sharing is not None and one.sharing.relative is not None
    }
    relative = [Text(), render_relative(found)] if found else []
    return Group(table, *relative, Text(), Text(_legend(layers), style="dim"))


def _legend(layers: Sequence[LayerInspection]) -> str:
    sentences = []
    thresholds = {one.dead_feature_threshold for one in layers} - {None}
    if thresholds:
        silence = " or ".join(units.short_count(threshold) for threshold in thresholds)
        sentences.append(f"Dead: has not fired in the last {silence} tokens.")
    if any(one.density for one in layers):
        sentences.append(
            "Firing density: the share of tokens on which a latent fires; bars count latents, on a log scale."
        )
    sentences += what_they_read(layers)
    low = min(one.norms.decoder_min for one in layers)
    high = max(one.norms.decoder_max for one in layers)
    sentences.append("Cosine: between each decoder row and the nearest other row.")
    sentences.append(f"Norms of decoder rows: {units.decimal(low, 3)} to {units.decimal(high, 3)}.")
    if any(one.trend for one in layers):
        sentences.append("FVU trends: each on its own log scale.")
    return " ".join(sentences)


def what_they_read(layers: Sequence[LayerInspection]) -> list[str]:
    """Say what transcoders and crosscoders read and predict; nothing of SAEs, whose names say it."""
    sentences = []
    elsewhere = [one for one in layers if one.kind == "transcoder" and one.reads != (f"{one.hookpoint}{IN}",)]
    if any(one.kind == "transcoder" and one not in elsewhere for one in layers):
        sentences.append("Transcoders read the input of the module that they are named after, and predict its output.")
    if elsewhere:
        inputs = ", ".join(fold([name for one in elsewhere for name in one.reads]))
        sentences.append(f"{', '.join(fold([one.hookpoint for one in elsewhere]))}: predicted from {inputs}.")
    pairs = [one for one in layers if one.sharing is not None and one.sharing.relative is not None]
    if pairs:
        sentences.append(
            "Crosscoders read and predict the hookpoint of their name in both models; other. is the second model."
        )
    sentences += [
        f"The crosscoder reads and predicts {', '.join(fold(one.reads))}."
        for one in layers
        if one.kind == "crosscoder" and one not in pairs
    ]
    return sentences


def _detail(layer: LayerInspection, width: int) -> RenderableType:
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(justify="right", no_wrap=True)
    facts.add_column(overflow="fold", style="dim")
    trend = Text()
    if layer.trend:
        line = sparkline([fvu for _, fvu in layer.trend], 24)
        first, last = layer.trend[0][0], layer.trend[-1][0]
        trend = Text.assemble((line, "cyan"), f"  steps {first:,} to {last:,}, log scale")
    silence = f"have not fired in the last {units.count(layer.dead_feature_threshold)} tokens"
    if layer.kind != "SAE":
        facts.add_row("reads", "", ", ".join(layer.reads))
        facts.add_row("predicts", "", "the same" if layer.kind == "crosscoder" else ", ".join(layer.writes))
    facts.add_row("FVU", Text(units.decimal(layer.fvu), "bold"), trend)
    facts.add_row("dead latents", tally(layer.dead, layer.num_latents), silence if layer.dead is not None else "")
    facts.add_row("never fired", tally(layer.never_fired, layer.num_latents), "")
    for name, value, remark in layer.facts:
        facts.add_row(name, units.decimal(value), remark)
    if layer.max_norm is not None:
        facts.add_row("norm limit", units.decimal(layer.max_norm, 1), "of counted activations (max_norm)")
    if layer.max_norm_out is not None:
        facts.add_row("", units.decimal(layer.max_norm_out, 1), "of counted targets (max_norm_out)")
    if layer.skip_norm is not None:
        facts.add_row("‖W_skip‖", units.decimal(layer.skip_norm, 3), "of the skip connection")
    parts = [facts, *_section("Firing density", _density(layer))]
    if layer.sharing is not None:
        parts += _section("Hookpoints that share latents", render_sharing(layer.sharing, layer.num_latents))
    parts += _section("Cosine between each decoder row and the nearest other row", _neighbours(layer))
    parts += _section("Norms", _norms(layer))
    return Panel(
        Group(*parts),
        title=Text(layer.hookpoint, "bold"),
        title_align="left",
        border_style="dim",
        padding=(1, 2),
        width=min(width, 84),
    )


def _section(title: str, content: RenderableType) -> list[RenderableType]:
    return [Text(), Text(title, "bold"), Padding(content, (0, 0, 0, 2))]


def _density(layer: LayerInspection) -> RenderableType:
    fires = layer.density
    if fires is None:
        return Text(units.UNKNOWN)
    quantiles = _figures(
        {"5%": fires.p5, "25%": fires.p25, "50%": fires.p50, "75%": fires.p75, "95%": fires.p95}, units.scientific
    )
    wide = [count for count in fires.histogram for _ in range(BIN_COLUMNS)]
    decade = BINS_PER_DECADE * BIN_COLUMNS
    axis = ("├" + "─" * (decade - 1)) + ("┼" + "─" * (decade - 1)) * (DENSITY_DECADES - 1) + "┤"
    labels = "".join(f"{f'1e-{power}':<{decade}}" for power in range(DENSITY_DECADES, 0, -1)) + "1"
    note = (
        f"share of {units.short_count(layer.tokens)} tokens on which a latent fires; "
        f"the highest bar is {max(wide):,} latents"
    )
    return Group(
        quantiles,
        Text(),
        *(Text(row, "cyan", no_wrap=True) for row in bars(wide, HISTOGRAM_ROWS)),
        Text(axis, "dim", no_wrap=True),
        Text(labels, "dim", no_wrap=True),
        Text(note, "dim"),
    )


def _neighbours(layer: LayerInspection) -> RenderableType:
    near = layer.neighbours
    if near is None:
        return Text(units.UNKNOWN)
    figures = _figures(
        {"median": near.median, "99%": near.p99, "max": near.max}, lambda cosine: units.decimal(cosine, 3)
    )
    note = f"{_duplicates(layer)} {'pair' if near.duplicates == 1 else 'pairs'} above {DUPLICATE_COSINE}"
    if near.rows < layer.num_latents:
        note += f", extrapolated from {near.rows:,} rows"
    return Group(figures, Text(note, "dim"))


def _norms(layer: LayerInspection) -> RenderableType:
    sizes = layer.norms
    return _figures(
        {
            "decoder min": sizes.decoder_min,
            "decoder median": sizes.decoder_median,
            "decoder max": sizes.decoder_max,
            "encoder median": sizes.encoder_median,
            "‖b_dec‖": sizes.b_dec,
        },
        lambda norm: units.decimal(norm, 3),
    )


def _figures(values: dict[str, float], show: Callable[[float], str]) -> Table:
    """Numbers under their names, side by side."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
    for name in values:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*map(show, values.values()))
    return table


def _duplicates(layer: LayerInspection) -> str:
    near = layer.neighbours
    if near is None:
        return units.UNKNOWN
    return ("~" if near.rows < layer.num_latents else "") + units.count(near.duplicates)


def _share(part: int | None, whole: int) -> str:
    return units.percent(None if part is None else part / whole)


def _range(layers: Sequence[LayerInspection], read: Callable[[LayerInspection], int | None]) -> str:
    """Return a number that all layers share, or its range."""
    known = [value for one in layers if (value := read(one)) is not None]
    return units.span(known) if known else units.UNKNOWN


def _pairs(histogram: Sequence[int]) -> list[int]:
    """Return the histogram with half as many bins."""
    return [a + b for a, b in zip(histogram[::2], histogram[1::2], strict=True)]
