"""The tables of `saekit eval`, from the content of `eval.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from saekit import units
from saekit.activations.hookpoints import OTHER
from saekit.text import for_screen

Estimate = Mapping[str, float | None]
ALONE = "  skip alone"
"""The row of a transcoder's skip connection, below its own."""


def render_evaluation(record: Mapping[str, Any], console: Console) -> None:
    """Print an evaluation: a line of origin, a table of the layers, and what the numbers mean."""
    console.print(
        Group(_origin(record), Text(), *evaluation_tables(record), Text(), Text(_legend(record), style="dim"))
    )
    for warning in record["warnings"]:
        line = Text(for_screen(f"Warning: {warning}", console))
        line.stylize("bold yellow", 0, len("Warning:"))
        console.print(line, soft_wrap=True)


def evaluation_tables(record: Mapping[str, Any]) -> tuple[RenderableType, ...]:
    """Return the layers' reconstructions, and what they cost the language model."""
    shown = _IfThereIsRoom(_reconstructions(record), _reconstructions(record, brief=True))
    if record["together"] is None:
        return (shown,)
    return shown, Text(), _IfThereIsRoom(_grafted(record), _grafted(record, brief=True))


def _reconstructions(record: Mapping[str, Any], brief: bool = False) -> Table:
    """Show the reconstruction; in brief, only the FVU has its interval."""
    layers = record["layers"]
    excluded = [_excluded(record, layer["reconstruction"]) for layer in layers]
    shown = _table(
        "layer", "FVU", "explained\nvariance", "cosine", "L0", "dead", *(["excluded"] if any(excluded) else [])
    )

    def fidelity(own: Mapping[str, Any], bold: bool) -> list[Text]:
        brief_too = (_number(own[key], brief=brief) for key in ("explained_variance", "cosine"))
        return [_number(own["fvu"], bold=bold), *brief_too]

    for layer, share in zip(layers, excluded, strict=True):
        own = layer["reconstruction"]
        shown.add_row(
            layer["hookpoint"],
            *fidelity(own, bold=True),
            _number(own["l0"], 1, brief=brief),
            units.percent(own["dead"] / own["num_latents"]),
            *([units.percent(share)] if any(excluded) else []),
        )
        for part in layer.get("parts", ()):
            shown.add_row(Text(f"  {part['hookpoint']}", "dim"), *fidelity(part, bold=False))
        if layer.get("skip"):
            shown.add_row(Text(ALONE, "dim"), *fidelity(layer["skip"], bold=False))
    return shown


def _excluded(record: Mapping[str, Any], own: Mapping[str, Any]) -> float:
    """The share of tokens whose activations are longer than those that the SAE is for; they are left as they are."""
    return 1 - own["tokens"] / record["tokens"]


def _grafted(record: Mapping[str, Any], brief: bool = False) -> Table:
    """Show the cost of the reconstructions; in brief, cross-entropies are without their intervals."""
    shown = _table("spliced in", "CE\nrecovered", "KL", "CE", "CE, mean\nablated", "CE, zero\nablated", "same\ntop-1")
    rows: list[tuple[str | Text, Mapping[str, Any]]] = []
    for layer in record["layers"]:
        rows.append((layer["hookpoint"], layer["grafted"]))
        if layer.get("skip"):
            rows.append((Text(ALONE, "dim"), layer["skip"]["grafted"]))
        if layer.get("other"):
            rows.append((f"{OTHER}{layer['hookpoint']}", layer["other"]))
    rows.append(("all", record["together"]))
    if _other(record):
        rows.append((f"{OTHER}all", record["other"]["together"]))
    for name, own in rows:
        shown.add_row(
            name,
            _number(own["ce_recovered"], bold=not isinstance(name, Text)),
            _number(own["kl"]),
            *(_number(own[key], 3, brief=brief) for key in ("ce", "ce_mean_ablated", "ce_zero_ablated")),
            units.percent(own["top1"]["value"]),
        )
    return shown


def _other(record: Mapping[str, Any]) -> bool:
    """Tell whether the second of two models was asked, too."""
    return record.get("other") is not None and record["other"]["together"] is not None


class _IfThereIsRoom:
    """One table, or where that would be cut off another."""

    def __init__(self, wide: Table, narrow: Table) -> None:
        self.wide, self.narrow = wide, narrow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = Measurement.get(console, options.update(max_width=10_000), self.wide).maximum
        yield self.wide if needed <= options.max_width else self.narrow


def _table(*columns: str) -> Table:
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        name = column if "\n" in column or not any("\n" in each for each in columns) else f"\n{column}"
        if number:
            shown.add_column(name, justify="right", no_wrap=True)
        else:  # hookpoints, whose names can be long: numbers are never cut off
            shown.add_column(name, overflow="fold", min_width=len("layers.0"))
    return shown


def _number(estimate: Estimate, digits: int = 4, bold: bool = False, brief: bool = False) -> Text:
    """Return a value and, unless in brief, half of its 95% interval: `0.1234 ± 0.0012`."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    text = Text(units.decimal(value, digits), style="bold" if bold else "")
    if not brief and low is not None and high is not None:
        text.append(f" ± {units.decimal((high - low) / 2, digits)}", style="dim not bold")
    return text


def _origin(record: Mapping[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("model", Text(record["model"], "bold"))
    if "other_model" in record:
        grid.add_row("other", Text(record["other_model"], "bold"))
    grid.add_row("data", Text(f"{record['dataset']} ({record['data']})"))
    amount = f"{record['sequences']:,} sequences of {record['ctx_len']:,}, {record['tokens']:,} counted tokens"
    grid.add_row("", Text(amount))
    scored = Text(record["objective"])
    if record["ce_clean"] is not None:
        clean = record["ce_clean"]
        scored.append(f", {record['scored']:,} scored; cross-entropy of the unmodified model ")
        scored.append_text(_number(clean, 3))
    if _other(record):
        scored.append(", of the other model ")
        scored.append_text(_number(record["other"]["ce_clean"], 3))
    grid.add_row("predicts", scored)
    return grid


def _legend(record: Mapping[str, Any]) -> str:
    kinds = {layer.get("kind", "SAE") for layer in record["layers"]}
    skips = any(layer.get("skip") for layer in record["layers"])
    sentences = [
        "± is half of a 95% interval over sequences.",
        "Dead: fired on none of these tokens.",
    ]
    if "transcoder" in kinds:
        sentences.append("Transcoders: FVU, explained variance and cosine compare prediction and target.")
    if skips:
        sentences.append("Skip alone: the prediction without the latents, W_skip x + b_dec.")
    if "crosscoder" in kinds:
        sentences.append(
            "Crosscoder: the mean over its hookpoints, each scaled to one variance; each of them is below it."
        )
    if any(_excluded(record, layer["reconstruction"]) for layer in record["layers"]):
        sentences.append(
            "Excluded: the share of tokens whose activation norm exceeds the SAE's limit; they keep their activations."
        )
    if record["together"] is not None:
        sentences += [
            "CE recovered: 1 is the unmodified model, 0 is zero ablation.",
            "CE and KL in nats per token.",
            "All: every layer replaced at once.",
        ]
        if record.get("other"):
            sentences.append(
                "Each model gets its own part of the reconstruction, made from the true activations of both; "
                "other. is the second model."
            )
        elif "crosscoder" in kinds:
            sentences.append("The crosscoder's hookpoints are replaced together; it reads the unmodified model.")
    return " ".join(sentences)
