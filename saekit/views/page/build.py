"""From a checkpoint to its page."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
from plotly.offline import get_plotlyjs

from saekit import units
from saekit._version import __version__
from saekit.analysis.codes import BEFORE
from saekit.analysis.defaults import DEFAULT_LATENTS
from saekit.analysis.eval_checkpoint import EvalOptions, Prepared, evaluate_prepared, prepare
from saekit.analysis.evaluate import Progress
from saekit.analysis.features import QUANTILES, TOP, Features, LayerFeatures, gather_features
from saekit.analysis.inspect import Inspection, inspect_path
from saekit.analysis.subject import of_kinds
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.runs.files import write_at_once
from saekit.runs.layout import EVAL_FORMAT, METRICS_FILE
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
from saekit.views.page.packing import pack_arrays, token_texts

NOTHING = -1


def build_report(
    path: Path,
    options: EvalOptions,
    file: Path,
    placement: Placement,
    latents: int = DEFAULT_LATENTS,
    status: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, of: None,
) -> int:
    """Evaluate a checkpoint if that was not done yet, look at its features, and write the page.

    Args:
        path: A run (its newest checkpoint), a checkpoint, or one SAE's folder.
        options: What to evaluate on and to take contexts from; without `max_tokens`, as many as were evaluated already.
        file: Where the page goes.
        placement: One process.
        latents: To look at closely, over all layers: they are what makes the page large.
        status: Told what is going on, as a line of text.
        progress: Told how far it is.

    Returns:
        The page's size in bytes.

    Raises:
        UserError: As `prepare`, and if the file cannot be written or there are several ranks.
    """
    if placement.world_size > 1:
        raise UserError("a report is made in one process: start it without a launcher (saekit eval takes several)")
    if not file.parent.is_dir():
        raise UserError(f"--output {file}: there is no folder {file.parent}")
    inspection = inspect_path(path, status=status, verify=options.verify)
    known = inspection.evaluation
    if options.max_tokens is None and known is not None:  # as many tokens of the same data are the same tokens
        options = replace(options, max_tokens=known["sequences"] * known["ctx_len"])
    # The files have just been compared with their checksums.
    prepared = prepare(path, replace(options, verify=False), placement, status)
    if known is None or not _fits(known, prepared):
        known = evaluate_prepared(prepared, status, progress).record
    kinds = [layer.kind for layer in inspection.layers]
    status(f"Reading the codes of {of_kinds(kinds)}")
    scales = {
        layer.hookpoint: [part.scale for part in layer.sharing.parts]
        for layer in inspection.layers
        if layer.sharing is not None
    }
    features = gather_features(prepared.subject, latents, progress, scales)
    status("Writing the page")
    page = render_page(inspection, known, features, prepared)
    try:
        write_at_once(file, page)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror})") from None
    return file.stat().st_size


def render_page(inspection: Inspection, evaluation: dict[str, Any], features: Features, prepared: Prepared) -> str:
    """Return the page's text."""
    records, evaluations = _records(inspection)
    names = [layer.hookpoint for layer in features.layers]
    figures = {
        **(training_charts(records, names) if records else {}),
        **(evaluation_charts(evaluations, records) if records and evaluations else {}),
        **layer_charts(evaluation),
        "density": density_chart(evaluation),
        "similarity": similarity_chart({layer.hookpoint: _nearest(layer) for layer in features.layers}),
    }
    found = {each.hookpoint: each.sharing for each in inspection.layers if each.sharing is not None}
    relative = {name: each.relative for name, each in found.items() if each.relative is not None}
    if relative:
        figures["relative"] = relative_chart(relative)
    for each in found.values() if not relative else ():  # a run has one crosscoder of one model
        figures["sharing"] = sharing_chart(each)
    vocabulary = _vocabulary(features)
    data = {
        "layers": [_facts(layer, evaluation) for layer in features.layers],
        "before": BEFORE,
        "top": TOP,
        "quantiles": QUANTILES,
        "vocabulary": token_texts(prepared.tokenizer, vocabulary.tolist()),
        "has_texts": prepared.tokenizer is not None,
        "has_lens": any(layer.lens is not None for layer in features.layers),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saekit.views.page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["script_json"] = _script_json
    environment.globals["active"] = units.active
    environment.globals["of_kinds"] = of_kinds
    return environment.get_template("report.html.j2").render(
        name=_name(inspection),
        inspection=inspection,
        reading=what_they_read(inspection.layers),
        evaluation=evaluation,
        charts=set(figures),
        figures={name: figure.to_plotly_json() for name, figure in figures.items()},
        data=data,
        text=pack_arrays({"ids": _compact(features.ids_ST, vocabulary)}),
        blobs=[pack_arrays(_arrays(layer, vocabulary)) for layer in features.layers],
        plotly=get_plotlyjs(),
        version=__version__,
    )


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


def _fits(record: dict[str, Any], prepared: Prepared) -> bool:
    """Tell whether an evaluation is of the same data."""
    cfg, subject = prepared.cfg, prepared.subject
    wanted = {
        "format": EVAL_FORMAT,
        "model": cfg.model.model,
        "other_model": None if cfg.other_model is None else cfg.other_model.model,
        "dataset": cfg.data.dataset,
        "split": cfg.data.split,
        "data": prepared.origin,
        "sequences": len(subject.data),
        "ctx_len": subject.data.ctx_len,
    }
    same_layers = {layer["hookpoint"] for layer in record["layers"]} == set(subject.saes)
    return same_layers and all(record.get(name) == value for name, value in wanted.items())


def _facts(layer: LayerFeatures, evaluation: dict[str, Any]) -> dict[str, Any]:
    (found,) = (each["reconstruction"] for each in evaluation["layers"] if each["hookpoint"] == layer.hookpoint)
    return {
        "hookpoint": layer.hookpoint,
        "num_latents": len(layer.counts_M),
        "tokens": found["tokens"],
        "no_lens": layer.no_lens,
        "parts": [] if layer.part_norms_LH is None else _writes(layer, evaluation),
    }


def _writes(layer: LayerFeatures, evaluation: dict[str, Any]) -> list[str]:
    (found,) = (each["writes"] for each in evaluation["layers"] if each["hookpoint"] == layer.hookpoint)
    return list(found)


def _nearest(layer: LayerFeatures) -> np.ndarray:
    """Return each latent's largest cosine with another, `[L]`; 0 in a dictionary of one."""
    cosines_LN = layer.neighbours.cosines_LN.numpy()
    return cosines_LN[:, 0] if cosines_LN.shape[1] else np.zeros(len(cosines_LN), np.float32)


def _vocabulary(features: Features) -> np.ndarray:
    """Ids of all tokens that the page shows, ascending."""
    shown = [features.ids_ST.reshape(-1)]
    for layer in features.layers:
        shown.append(layer.favorites_L[layer.favorites_L >= 0])
        if layer.lens is not None:
            shown += [layer.lens.promoted_LN.numpy().reshape(-1), layer.lens.suppressed_LN.numpy().reshape(-1)]
    return np.unique(np.concatenate(shown))


def _compact(ids: np.ndarray, vocabulary: np.ndarray) -> np.ndarray:
    """Places in the page's vocabulary; -1 stays."""
    return np.where(ids >= 0, np.searchsorted(vocabulary, ids), NOTHING)


def _arrays(layer: LayerFeatures, vocabulary: np.ndarray) -> dict[str, np.ndarray]:
    """Return the data of a layer that `browser.js` reads."""
    largest_L = layer.quantiles_L[:, -1][:, None, None]
    with np.errstate(invalid="ignore"):
        shades = np.ceil(np.nan_to_num(layer.contexts.acts_LCW / largest_L) * 255)
    arrays = {
        "latents": layer.latents_L,
        "counts": layer.counts_M[layer.latents_L],
        "silent": np.flatnonzero(layer.counts_M == 0),
        "quantiles": layer.quantiles_L,
        "places": layer.contexts.places_LC,
        "acts": layer.contexts.acts_LC,
        "shades": shades.astype(np.uint8),
        "favorites": _compact(layer.favorites_L, vocabulary),
        "shares": layer.shares_L,
        "neighbours": layer.neighbours.latents_LN.numpy(),
        "cosines": layer.neighbours.cosines_LN.numpy(),
    }
    if layer.part_norms_LH is not None:
        arrays["norms"] = layer.part_norms_LH.numpy()
    if layer.lens is not None:
        arrays |= {
            "promoted": _compact(layer.lens.promoted_LN.numpy(), vocabulary),
            "rises": layer.lens.rises_LN.numpy(),
            "suppressed": _compact(layer.lens.suppressed_LN.numpy(), vocabulary),
            "falls": layer.lens.falls_LN.numpy(),
        }
    return arrays


def _script_json(value: Any) -> Any:
    """JSON for a script element: nothing in it ends the element, and NaN, which JSON lacks, is null."""
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return markupsafe.Markup(text)
