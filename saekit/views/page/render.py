"""The page itself: the template, filled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
from plotly.offline import get_plotlyjs

from saekit import units
from saekit._version import __version__
from saekit.analysis.codes import AFTER, BEFORE
from saekit.analysis.features import QUANTILES, TOP
from saekit.analysis.inspect import Inspection
from saekit.analysis.subject import of_kinds
from saekit.runs.layout import METRICS_FILE
from saekit.runs.metrics import EVALUATION, plain, read_records
from saekit.views.inspection import what_they_read
from saekit.views.page.charts import (
    density_chart,
    evaluation_charts,
    layer_charts,
    relative_chart,
    sharing_chart,
    similarity_chart,
    training_charts,
)


@dataclass(frozen=True)
class Content:
    """What both forms of the page show."""

    inspection: Inspection
    evaluation: dict[str, Any]
    """The content of `eval.json`."""
    layers: list[dict[str, Any]]
    """Facts of each coder (`arrays.facts_of`)."""
    nearest: dict[str, np.ndarray]
    """By hookpoint, each latent's largest cosine with another, `[L]`."""
    tokens: list[str]
    """The page's vocabulary, as text."""
    has_texts: bool
    """Whether the model has a tokenizer."""


def render_file(content: Content, text: str, blobs: list[str]) -> str:
    """Return a page that needs nothing else.

    Args:
        content: What to show.
        text: The text that features are looked at in, packed.
        blobs: The arrays of each layer, packed.
    """
    return _render(content, {}, served=False, text=text, blobs=blobs, plotly=get_plotlyjs())


def render_served(content: Content, build: str, text: dict[str, Any]) -> str:
    """Return a page that asks the server that gave it for what is looked at.

    Args:
        content: What to show; the facts of each layer include its columns.
        build: Where its data is (`folder`).
        text: Type and width of the text.
    """
    return _render(content, {"build": build, "text": text}, served=True, text="", blobs=[], plotly="")


def _render(content: Content, more: dict[str, Any], **given: Any) -> str:
    data = {
        **more,
        "layers": content.layers,
        "before": BEFORE,
        "after": AFTER,
        "top": TOP,
        "quantiles": QUANTILES,
        "vocabulary": content.tokens,
        "has_texts": content.has_texts,
        "has_lens": any(layer["has_lens"] for layer in content.layers),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saekit.views.page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["script_json"] = _script_json
    environment.globals["active"] = units.active
    environment.globals["of_kinds"] = of_kinds
    figures = _figures(content)
    return environment.get_template("report.html.j2").render(
        name=_name(content.inspection),
        inspection=content.inspection,
        reading=what_they_read(content.inspection.layers),
        evaluation=content.evaluation,
        charts=set(figures),
        figures={name: figure.to_plotly_json() for name, figure in figures.items()},
        data=data,
        version=__version__,
        **given,
    )


def _figures(content: Content) -> dict[str, Any]:
    inspection, evaluation = content.inspection, content.evaluation
    records, evaluations = _records(inspection)
    names = [layer["hookpoint"] for layer in content.layers]
    figures = {
        **(training_charts(records, names) if records else {}),
        **(evaluation_charts(evaluations, records) if records and evaluations else {}),
        **layer_charts(evaluation),
        "density": density_chart(evaluation),
        "similarity": similarity_chart(content.nearest),
    }
    found = {each.hookpoint: each.sharing for each in inspection.layers if each.sharing is not None}
    relative = {name: each.relative for name, each in found.items() if each.relative is not None}
    if relative:
        figures["relative"] = relative_chart(relative)
    for each in found.values() if not relative else ():  # a run has one crosscoder of one model
        figures["sharing"] = sharing_chart(each)
    return figures


def _records(inspection: Inspection) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the run's reports and evaluations up to the checkpoint; none without the file."""
    file = inspection.checkpoint.parent / METRICS_FILE
    records = read_records(file) if file.is_file() else []
    records = [record for record in records if inspection.step is None or record["step"] <= inspection.step]
    reports, evaluations = ([each for each in records if each.get("kind") == kind] for kind in (None, EVALUATION))
    return reports, evaluations


def _name(inspection: Inspection) -> str:
    """Return the model's: a hub id as it is, of a local folder the last two parts, as a hub id has two."""
    return "/".join(Path(inspection.model or inspection.checkpoint.name).parts[-2:])


def _script_json(value: Any) -> Any:
    """JSON for a script element: nothing in it ends the element, and NaN, which JSON lacks, is null."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return markupsafe.Markup(text)
