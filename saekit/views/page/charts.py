"""The page's charts, as figures of plotly's; the page gives them the colors of its theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.colors
import plotly.graph_objects as go

from saekit.activations.hookpoints import OTHER
from saekit.analysis.measure import BINS_PER_DECADE, DENSITY_DECADES
from saekit.analysis.sharing import RELATIVE_BINS, Sharing

TICKS = [digit * 10**power for power in (-3, -2, -1, 0) for digit in (1, 2, 5)]
LOG_FVU = {"type": "log", "tickmode": "array", "tickvals": TICKS, "ticktext": [f"{tick:g}" for tick in TICKS]}
"""By themselves the ticks of a short logarithmic axis are single digits."""
FROM_ZERO = {"rangemode": "tozero"}
POINTS = 400
"""Of a training curve; more would only be drawn over each other."""
SIMILARITY_BINS = 50


def training_charts(records: Sequence[Mapping[str, Any]], hookpoints: Sequence[str]) -> dict[str, go.Figure]:
    """FVU and dead latents of each layer, and tokens per second, over the tokens that were trained on.

    Args:
        records: Of `metrics.jsonl`, in its order.
        hookpoints: Layers to draw.
    """
    some = [records[place] for place in _places(len(records))]
    tokens = [record["tokens"] for record in some]

    def curve(name: str, key: str, factor: float = 1) -> list[float | None]:
        values = (record["layers"].get(name, {}).get(key) for record in some)
        return [None if value is None else factor * value for value in values]

    def layers(key: str, factor: float = 1) -> list[go.Scatter]:
        return [
            go.Scatter(x=tokens, y=curve(name, key, factor), name=name, mode="lines", line={"color": color})
            for name, color in _colored(hookpoints)
        ]

    rate = go.Scatter(x=tokens, y=[record["tokens_per_second"] for record in some], mode="lines", showlegend=False)
    return {
        "training-fvu": _figure(layers("fvu"), "tokens", "FVU", yaxis=LOG_FVU),
        "training-dead": _figure(layers("dead_fraction", 100), "tokens", "dead latents, %", yaxis=FROM_ZERO),
        "training-rate": _figure([rate], "tokens", "tokens per second", yaxis=FROM_ZERO),
    }


def evaluation_charts(
    evaluations: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> dict[str, go.Figure]:
    """Each layer's FVU and CE recovered on held-out tokens while it trained, over the tokens that were trained on.

    Args:
        evaluations: Of `metrics.jsonl`, in its order; at least one.
        records: The reports of the same file, which tell how many tokens a step is; at least one.
    """
    steps, counts = [record["step"] for record in records], [record["tokens"] for record in records]
    tokens = np.interp([record["step"] for record in evaluations], steps, counts).round().astype(int).tolist()
    layers = [{each["hookpoint"]: each for each in record["evaluation"]["layers"]} for record in evaluations]

    def curves(part: str, metric: str) -> list[go.Scatter]:
        return [
            go.Scatter(
                x=tokens,
                y=[each[name][part][metric]["value"] for each in layers],
                name=name,
                mode="lines+markers",
                line={"color": color},
            )
            for name, color in _colored(list(layers[0]))
        ]

    charts = {"held-out-fvu": _figure(curves("reconstruction", "fvu"), "tokens", "FVU", yaxis=LOG_FVU)}
    if evaluations[0]["evaluation"]["together"] is not None:
        charts["held-out-ce"] = _figure(curves("grafted", "ce_recovered"), "tokens", "CE recovered")
    return charts


def layer_charts(evaluation: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Return each layer's FVU, CE recovered and KL with their intervals, from the content of `eval.json`."""
    layers = evaluation["layers"]
    names = [layer["hookpoint"] for layer in layers]
    fvu = {layer["hookpoint"]: layer["reconstruction"]["fvu"] for layer in layers}
    for layer in layers:  # of a crosscoder each hookpoint, behind its name
        fvu |= {part["hookpoint"]: part["fvu"] for part in layer.get("parts", ())}
    charts = {"layer-fvu": _bars(list(fvu), list(fvu.values()), "FVU")}
    if evaluation["together"] is not None:
        grafted = [*(layer["grafted"] for layer in layers), evaluation["together"]]
        names = [*names, "all"]
        for layer in layers:  # of two models the second's answers, behind the first's
            if layer.get("other"):
                names.append(f"{OTHER}{layer['hookpoint']}")
                grafted.append(layer["other"])
        for chart, key, title in (("layer-ce", "ce_recovered", "CE recovered"), ("layer-kl", "kl", "KL, nats")):
            charts[chart] = _bars(names, [each[key] for each in grafted], title)
    return charts


def density_chart(evaluation: Mapping[str, Any]) -> go.Figure:
    """On which share of the tokens how many latents fire, per layer."""
    centres = [10 ** ((place + 0.5) / BINS_PER_DECADE - DENSITY_DECADES) for place in range(_bins())]
    lines = []
    layers = {layer["hookpoint"]: layer["reconstruction"] for layer in evaluation["layers"]}
    for name, color in _colored(list(layers)):
        counts = layers[name]["density"]["histogram"]
        lines.append(go.Scatter(x=centres, y=counts, name=name, line={"color": color, "shape": "hvh"}))
    return _figure(
        lines,
        "share of tokens on which a latent fires",
        "latents",
        xaxis={"type": "log", "dtick": 1, "exponentformat": "power"},
    )


def similarity_chart(nearest: Mapping[str, np.ndarray]) -> go.Figure:
    """Chart the cosine between each decoder row and its nearest neighbor: latents per cosine, for each layer.

    Args:
        nearest: By hookpoint, each latent's largest cosine with another, `[L]`.
    """
    edges = np.linspace(0, 1, SIMILARITY_BINS + 1)
    centres = ((edges[:-1] + edges[1:]) / 2).round(4).tolist()
    lines = []
    for name, color in _colored(list(nearest)):
        counts, _ = np.histogram(nearest[name].clip(0, 1), edges)
        lines.append(go.Scatter(x=centres, y=counts.tolist(), name=name, line={"color": color, "shape": "hvh"}))
    return _figure(lines, "cosine with the nearest decoder row", "latents")


def sharing_chart(found: Sharing) -> go.Figure:
    """Chart how many of a crosscoder's latents are written to one hookpoint, to two, and so on."""
    counts = [str(count) for count in range(1, len(found.latents) + 1)]
    bars = go.Bar(x=counts, y=list(found.latents), showlegend=False)
    return _figure([bars], "hookpoints", "latents", xaxis={"type": "category"})


def relative_chart(histograms: Mapping[str, Sequence[int]]) -> go.Figure:
    """Chart how many latents of crosscoders of two models have which relative decoder norm.

    Args:
        histograms: By hookpoint, `Sharing.relative`.
    """
    centres = [(place + 0.5) / RELATIVE_BINS for place in range(RELATIVE_BINS)]
    lines = [
        go.Scatter(x=centres, y=list(histograms[name]), name=name, line={"color": color, "shape": "hvh"})
        for name, color in _colored(list(histograms))
    ]
    return _figure(lines, "relative decoder norm", "latents", xaxis={"range": [0, 1]})


def _bars(names: list[str], estimates: list[Mapping[str, float | None]], title: str) -> go.Figure:
    values = [each["value"] for each in estimates]
    up = [_distance(each["high"], each["value"]) for each in estimates]
    down = [_distance(each["value"], each["low"]) for each in estimates]
    error = {"type": "data", "array": up, "arrayminus": down, "symmetric": False, "thickness": 1.5}
    return _figure([go.Bar(x=names, y=values, error_y=error, showlegend=False)], "", title, xaxis={"type": "category"})


def _distance(high: float | None, low: float | None) -> float:
    return 0 if high is None or low is None else high - low


def _figure(
    data: Sequence[Any],
    x: str,
    y: str,
    xaxis: dict[str, Any] | None = None,
    yaxis: dict[str, Any] | None = None,
) -> go.Figure:
    layout = go.Layout(
        template="none",
        xaxis={"title": {"text": x}, "exponentformat": "SI", "automargin": True, **(xaxis or {})},
        yaxis={"title": {"text": y}, "exponentformat": "SI", "automargin": True, **(yaxis or {})},
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        hovermode="x unified",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    return go.Figure(list(data), layout)


def _colored(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return a color per layer, in the order of a scale whose colors show on light and on dark."""
    shares = np.linspace(0.08, 0.92, len(names)).tolist() if len(names) > 1 else [0.2]
    return list(zip(names, plotly.colors.sample_colorscale("Turbo", shares), strict=True))


def _bins() -> int:
    return DENSITY_DECADES * BINS_PER_DECADE


def _places(count: int) -> list[int]:
    """At most `POINTS` of them, evenly, the last included."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int)).tolist() if count else []
