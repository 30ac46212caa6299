"""The view of `saekit inspect A B`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from saekit import units
from saekit.analysis.compare import SHARED_COSINE, Comparison, LayerComparison, Shared
from saekit.analysis.inspect import LayerInspection
from saekit.runs.metrics import plain

Show = Callable[[Any], str]
Both = tuple[float | None, float | None]
ALIKE = 0.1
"""Limits of length from two first batches differ by less than this part of them."""


def render_comparison(comparison: Comparison, console: Console) -> None:
    """Print two checkpoints side by side; the better of two numbers is bold."""
    with_evaluation = all(
        comparison.evaluated(which, layer.hookpoint) for which in ("first", "second") for layer in comparison.layers
    )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    heads = ["FVU", "dead"] + (["FVU, held out", "CE recovered", "KL"] if with_evaluation else []) + ["shared"]
    table.add_column("\nlayer", overflow="fold", min_width=len("layers.0"))
    for head in heads:
        table.add_column(f"{head}\nA", justify="right", no_wrap=True)
        table.add_column("\nB", justify="right", no_wrap=True)
    for layer in comparison.layers:
        cells = [*_pair((layer.first.fvu, layer.second.fvu), units.decimal), *_dead(layer)]
        if with_evaluation:
            cells += _evaluation(comparison, layer.hookpoint)
        table.add_row(layer.hookpoint, *cells, _shared(layer.of_first), _shared(layer.of_second))
    console.print(
        Group(_origin(comparison), Text(), table, Text(), Text(_legend(comparison, with_evaluation), style="dim"))
    )


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the same as JSON types."""
    return {
        "first": str(comparison.first.path),
        "second": str(comparison.second.path),
        "shared_cosine": SHARED_COSINE,
        "layers": [
            {
                **plain(asdict(layer)),
                "evaluated_first": comparison.evaluated("first", layer.hookpoint),
                "evaluated_second": comparison.evaluated("second", layer.hookpoint),
            }
            for layer in comparison.layers
        ],
    }


def _origin(comparison: Comparison) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, one in (("A", comparison.first), ("B", comparison.second)):
        sizes = "/".join(
            dict.fromkeys(
                f"{layer.num_latents:,} latents, k {units.active(layer.k, layer.activation)}" for layer in one.layers
            )
        )
        tokens = f"{units.short_count(one.tokens)} tokens"
        kinds = dict.fromkeys("skip transcoder" if layer.skip_norm is not None else layer.kind for layer in one.layers)
        said = "" if list(kinds) == ["SAE"] else f"{' and '.join(f'{kind}s' for kind in kinds)} · "
        grid.add_row(Text(name, "dim"), Text(str(one.path), "bold cyan"), Text(f"{said}{sizes} · {tokens}"))
    return grid


def _pair(both: Both, show: Show, larger_is_better: bool = False) -> list[Text]:
    """Both numbers, the better one bold."""
    (first, second), better = both, ""
    if first is not None and second is not None and first != second:
        better = "first" if (first > second) == larger_is_better else "second"
    return [
        Text(show(first), "bold" if better == "first" else ""),
        Text(show(second), "bold" if better == "second" else ""),
    ]


def _dead(layer: LayerComparison) -> list[Text]:
    def share(one: LayerInspection) -> float | None:
        return None if one.dead is None else one.dead / one.num_latents

    return _pair((share(layer.first), share(layer.second)), units.percent)


def _evaluation(comparison: Comparison, hookpoint: str) -> list[Text]:
    def value(which: str, part: str, name: str) -> float | None:
        layer = comparison.evaluated(which, hookpoint) or {}
        return layer[part][name]["value"] if layer.get(part) else None

    def both(part: str, name: str) -> Both:
        return value("first", part, name), value("second", part, name)

    return [
        *_pair(both("reconstruction", "fvu"), units.decimal),
        *_pair(both("grafted", "ce_recovered"), units.decimal, larger_is_better=True),
        *_pair(both("grafted", "kl"), units.decimal),
    ]


def _shared(shared: Shared | None) -> Text:
    return Text(units.UNKNOWN if shared is None else f"{units.percent(shared.share)} ({shared.mean:.2f})")


def _legend(comparison: Comparison, with_evaluation: bool) -> str:
    sentences = [
        "FVU: as last reported in training.",
        f"Shared: latents whose decoder row has a cosine of at least {SHARED_COSINE} with a row of the other's; "
        "in brackets, the mean of each row's largest cosine.",
    ]
    if any(_others_left_out(layer.first.max_norm, layer.second.max_norm) for layer in comparison.layers):
        sentences.append(
            "The two exclude tokens above different norms (max_norm): FVUs compare only if there are no such tokens."
        )
    if any(layer.first.reads != layer.second.reads for layer in comparison.layers):
        sentences.append(
            "Some with the same name read different hookpoints: their FVUs are of the same target, from another input."
        )
    if any(layer.of_first is None for layer in comparison.layers):
        sentences.append("Decoder rows are not compared where the two write different hookpoints or widths.")
    if not with_evaluation:
        sentences.append("Run saekit eval on both to compare what they cost the language model.")
    return " ".join(sentences)


def _others_left_out(first: float | None, second: float | None) -> bool:
    """Tell whether two norm limits differ by more than two first batches would make them differ."""
    if first is None or second is None:
        return first is not second
    return abs(first - second) > ALIKE * max(first, second)
