"""From a checkpoint to its page: as one file, or as a folder that is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from saekit.analysis.defaults import DEFAULT_LATENTS
from saekit.analysis.eval_checkpoint import EvalOptions, Prepared, evaluate_prepared, prepare
from saekit.analysis.evaluate import Progress
from saekit.analysis.features import LayerFeatures, each_layer, read_text
from saekit.analysis.inspect import Inspection, inspect_path
from saekit.analysis.subject import of_kinds
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.runs.files import write_at_once
from saekit.runs.layout import EVAL_FORMAT
from saekit.runs.locate import locate
from saekit.views.page.arrays import Vocabulary, arrays_of, facts_of, nearest, silent_of
from saekit.views.page.folder import identity
from saekit.views.page.packing import pack_arrays, token_texts
from saekit.views.page.render import Content, render_file, render_served
from saekit.views.page.writing import check_place, new_folder

Status = Callable[[str], None]


def build_report(
    path: Path,
    options: EvalOptions,
    file: Path,
    placement: Placement,
    latents: int = DEFAULT_LATENTS,
    status: Status = lambda text: None,
    progress: Progress = lambda done, of: None,
) -> int:
    """Evaluate a checkpoint if that was not done yet, look at its features, and write the page as one file.

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
    if not file.parent.is_dir():
        raise UserError(f"--output {file}: there is no folder {file.parent}")
    gathering = Gathering(path, options, placement, status, progress)
    text = pack_arrays({"ids": gathering.text_ST})
    blobs = [pack_arrays(arrays | silent) for arrays, silent, _ in gathering.layers(latents)]
    status("Writing the page")
    page = render_file(gathering.content(), text, blobs)
    try:
        write_at_once(file, page)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror})") from None
    return file.stat().st_size


def build_folder(
    path: Path,
    options: EvalOptions,
    folder: Path,
    placement: Placement,
    latents: int | None,
    asked: dict[str, Any],
    status: Status = lambda text: None,
    progress: Progress = lambda done, of: None,
) -> int:
    """Do the same, but write a folder, layer by layer: of it, `saekit report --serve` reads what is looked at.

    In memory are the model, all coders, and what `each_layer` says.

    Args:
        path: As for `build_report`, and what is not listed here.
        options: What to evaluate on.
        folder: Where the report goes; an earlier one there is replaced when this one is whole.
        placement: One process.
        latents: To look at closely, over all layers; None for all.
        asked: What the caller was asked for, kept in the folder (`folder.fits`).
        status: Told what is going on.
        progress: Told how far it is.

    Returns:
        The folder's size in bytes.

    Raises:
        UserError: As `build_report`.
    """
    locate(path, verify=options.verify)  # so that what is missing is not the folder inside it
    check_place(folder)
    gathering = Gathering(path, options, placement, status, progress)
    with new_folder(folder) as writer:
        text = writer.add_text(gathering.text_ST)
        for arrays, silent, facts in gathering.layers(latents):
            facts["columns"] = writer.add_layer(arrays | silent)
        status("Writing the page")
        writer.finish(render_served(gathering.content(), writer.build, text), identity(path), asked)
    return sum(each.stat().st_size for each in folder.iterdir())


class Gathering:
    """Evaluates a checkpoint if that was not done yet, and reads its features, one layer after another.

    Attributes:
        text_ST: The text that features are looked at in, int64 `[S, T]`, in numbers of the page's vocabulary.
    """

    def __init__(
        self, path: Path, options: EvalOptions, placement: Placement, status: Status, progress: Progress
    ) -> None:
        if placement.world_size > 1:
            raise UserError("a report is made in one process: start it without a launcher (saekit eval takes several)")
        self._status, self._progress = status, progress
        self._inspection = inspect_path(path, status=status, verify=options.verify)
        known = self._inspection.evaluation
        if options.max_tokens is None and known is not None:  # as many tokens of the same data are the same tokens
            options = replace(options, max_tokens=known["sequences"] * known["ctx_len"])
        # The files have just been compared with their checksums.
        self._prepared = prepare(path, replace(options, verify=False), placement, status)
        if known is None or not _fits(known, self._prepared):
            known = evaluate_prepared(self._prepared, status, progress).record
        self._evaluation = known
        self._vocabulary = Vocabulary()
        self._facts: list[dict[str, Any]] = []
        self._nearest: dict[str, np.ndarray] = {}
        self.text_ST = self._vocabulary.numbers(read_text(self._prepared.subject))

    def layers(
        self, latents: int | None
    ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]]:
        """Yield of each layer its latents' arrays, the latents that never fired, and its facts."""
        self._status(f"Reading the codes of {of_kinds([layer.kind for layer in self._inspection.layers])}")
        for layer in each_layer(self._prepared.subject, latents, self._progress, _scales(self._inspection)):
            yield self._taken(layer)

    def _taken(self, layer: LayerFeatures) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
        self._facts.append(facts_of(layer, self._evaluation))
        self._nearest[layer.hookpoint] = nearest(layer)
        return arrays_of(layer, self._vocabulary), silent_of(layer), self._facts[-1]

    def content(self) -> Content:
        """Return what the page shows, when all layers have been read."""
        tokenizer = self._prepared.tokenizer
        return Content(
            inspection=self._inspection,
            evaluation=self._evaluation,
            layers=self._facts,
            nearest=self._nearest,
            tokens=token_texts(tokenizer, self._vocabulary.ids),
            has_texts=tokenizer is not None,
        )


def _scales(inspection: Inspection) -> dict[str, list[float]]:
    return {
        layer.hookpoint: [part.scale for part in layer.sharing.parts]
        for layer in inspection.layers
        if layer.sharing is not None
    }


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
