"""Read and measure a checkpoint's files for `saekit inspect`, without a language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.analysis.coder_files import mapping, number, read_scale, read_site, read_weights, text, whole
from saekit.analysis.measure import (
    BINS_PER_DECADE,
    DENSITY_DECADES,
    DUPLICATE_COSINE,
    Density,
    NearestCosines,
    Norms,
    density,
    neighbours,
    norms,
)
from saekit.analysis.sharing import Sharing, compared, sharing
from saekit.errors import UserError
from saekit.registry import SELECTIONS
from saekit.runs.layout import ABOUT_FILE, EVAL_FILE, EVAL_FORMAT, METRICS_FILE, STATE_FILE
from saekit.runs.locate import Location, check_files, locate, read_json, read_some_tensors, select
from saekit.runs.metrics import plain, read_metrics
from saekit.runs.opening import OTHER_MODEL, check_contents
from saekit.sae.storage import CONFIG_FILE as SAE_CONFIG
from saekit.sae.storage import WEIGHTS_FILE as WEIGHTS


@dataclass(frozen=True)
class LayerInspection:
    """The inspection of one SAE, transcoder or crosscoder. None means that its files do not say."""

    hookpoint: str
    path: Path
    kind: str
    """"SAE", "transcoder" or "crosscoder"."""
    reads: tuple[str, ...]
    """Names of the hookpoints that it reads."""
    writes: tuple[str, ...]
    """Names of the hookpoints that it predicts."""
    d_in: int
    """The width of its input."""
    d_out: int
    """The width of its prediction."""
    num_latents: int
    k: int | None
    activation: str | None
    facts: tuple[tuple[str, float, str], ...]
    """The selection's numbers (`Selection.facts`): name, value and remark."""
    max_norm: float | None
    """The largest norm of counted activations."""
    max_norm_out: float | None
    """The largest norm of a counted transcoder's target."""
    fvu: float | None
    """Fraction of variance unexplained, as last reported in training."""
    trend: tuple[tuple[int, float | None], ...]
    """Step and FVU of every report up to the checkpoint. Empty without the run's `metrics.jsonl`."""
    tokens: int | None
    """The number of tokens that it was trained on."""
    dead_feature_threshold: int | None
    """A latent is dead if it has not fired in this many tokens."""
    dead: int | None
    """The number of dead latents."""
    never_fired: int | None
    """The number of latents that never fired."""
    density: Density | None
    neighbours: NearestCosines | None
    norms: Norms
    skip_norm: float | None
    """The Frobenius norm of a transcoder's `W_skip`. None without a skip connection."""
    sharing: Sharing | None
    """How a crosscoder's hookpoints share latents. None for other coders."""


@dataclass(frozen=True)
class Inspection:
    """The inspection of a checkpoint or a part of it. None means that its files do not say."""

    path: Path
    """The path as given."""
    kind: str
    """The kind of `path`: "run", "checkpoint" or "sae"."""
    checkpoint: Path
    """The checkpoint's folder. For a single SAE, the folder that contains it."""
    model: str | None
    dataset: str | None
    step: int | None
    total_steps: int | None
    tokens: int | None
    """The number of tokens trained on."""
    ctx_len: int | None
    """Tokens per sequence."""
    saekit_version: str | None
    layers: tuple[LayerInspection, ...]
    other_model: str | None = None
    """The second model, for crosscoders of two models."""
    evaluation: dict[str, Any] | None = None
    """The content of `eval.json` for these layers, if `saekit eval` was run."""


def inspect_path(
    path: str | Path,
    layer: str | int | None = None,
    status: Callable[[str], None] | None = None,
    *,
    verify: bool = True,
) -> Inspection:
    """Read and measure the SAEs of a run (its latest checkpoint), of a checkpoint, or of one SAE folder.

    Args:
        path: The folder. It can also be a checkpoint written by sparsify.
        layer: Inspect only this layer: a hookpoint's name or a layer number.
        status: Called with a line of text on progress, since a large SAE takes seconds.
        verify: Whether to compare the files, including counters, with the checkpoint's checksums.

    Raises:
        UserError: If there is no SAE or no such layer, or if a file is missing or damaged.
    """
    location = locate(Path(path), verify=verify)
    chosen = select(location.saes, layer)
    if verify:
        check_files(location, chosen)
    notes = [_notes(location.saes[name]) for name in chosen]
    facts = {**notes[0], **location.manifest}
    step = whole(facts, "step")
    trends = _trends(location, step)
    layers = []
    for place, (name, note) in enumerate(zip(chosen, notes, strict=True), start=1):
        if status is not None:
            status(f"reading {name} ({place} of {len(chosen)})")
        if verify:
            check_contents(location.saes[name], without=())
        hookpoint = text(note, "hookpoint") or name
        trend = trends.get(hookpoint, ())
        layers.append(_inspect_sae(hookpoint, location.saes[name], {**location.manifest, **note}, trend))
    return Inspection(
        path=Path(path),
        kind=location.kind,
        checkpoint=location.checkpoint,
        model=text(facts, "model"),
        dataset=text(facts, "dataset"),
        step=step,
        total_steps=whole(mapping(facts, "schedule"), "total_steps"),
        tokens=whole(facts, "tokens"),
        ctx_len=whole(facts, "ctx_len"),
        saekit_version=text(facts, "saekit_version"),
        layers=tuple(layers),
        other_model=text(facts, OTHER_MODEL),
        evaluation=_evaluation(location, {layer.hookpoint for layer in layers}),
    )


def inspection_to_json(inspection: Inspection) -> dict[str, Any]:
    """Convert an inspection to JSON types: paths to strings, NaN and infinity to None."""
    data = plain(asdict(inspection))
    for layer in data["layers"]:
        layer |= {name: value for name, value, _ in layer.pop("facts")}
    data["density_histogram_log10_edges"] = [
        i / BINS_PER_DECADE - DENSITY_DECADES for i in range(DENSITY_DECADES * BINS_PER_DECADE + 1)
    ]
    data["duplicate_cosine"] = DUPLICATE_COSINE
    return data


def _inspect_sae(
    hookpoint: str, folder: Path, note: dict[str, Any], trend: tuple[tuple[int, float | None], ...]
) -> LayerInspection:
    config = read_json(folder / SAE_CONFIG)
    encoder_MD, decoder_MD, b_dec_D, skip = read_weights(folder / WEIGHTS)
    (num_latents, d_in), d_out = encoder_MD.shape, decoder_MD.shape[1]
    if (whole(config, "d_in") or d_in) != d_in:
        raise UserError(
            f"{folder / WEIGHTS} does not match {SAE_CONFIG}: the width is {d_in}, but {SAE_CONFIG} says "
            f"{config['d_in']}"
        )
    if d_out != (whole(config, "d_out") or d_in) or (skip is not None and skip.shape != (d_out, d_in)):
        raise UserError(
            f"{folder / WEIGHTS} does not match {SAE_CONFIG}: it predicts a width of {d_out} from one of {d_in}"
            f"{'' if skip is None else f' and has a skip connection {list(skip.shape)}'}, but {SAE_CONFIG} says "
            f"{whole(config, 'd_out') or d_in} from {d_in}"
        )
    expected = (whole(config, "num_latents") or 0) or (whole(config, "expansion_factor") or 0) * d_in
    if len(decoder_MD) != num_latents or expected not in (0, num_latents):
        raise UserError(
            f"{folder / WEIGHTS} does not match {SAE_CONFIG}: the encoder has {num_latents:,} latents and the decoder "
            f"{len(decoder_MD):,}, but {SAE_CONFIG} says {expected:,}"
        )
    site = read_site(hookpoint, folder, config, d_in, d_out)
    crossing = site.kind == "crosscoder"
    scale_D = read_scale(folder, d_in) if crossing else None
    parts = sharing(decoder_MD, {part.name: part.width for part in site.reads}, scale_D) if crossing else None
    tokens, threshold = whole(note, "tokens"), whole(note, "dead_feature_threshold")
    silent_M, fired_M = _counters(folder, num_latents)
    fvu = number(note, "fvu")
    return LayerInspection(
        hookpoint=hookpoint,
        path=folder,
        kind=site.kind,
        reads=tuple(part.name for part in site.reads),
        writes=tuple(part.name for part in site.writes),
        d_in=d_in,
        d_out=d_out,
        num_latents=num_latents,
        k=whole(config, "k"),
        activation=text(config, "activation"),
        facts=_facts(config),
        max_norm=number(config, "max_norm"),
        max_norm_out=number(config, "max_norm_out"),
        fvu=fvu if fvu is not None else (trend[-1][1] if trend else None),
        trend=trend,
        tokens=tokens,
        dead_feature_threshold=threshold,
        dead=None if silent_M is None or threshold is None else int((silent_M >= threshold).sum()),
        never_fired=None if fired_M is None else int((fired_M == 0).sum()),
        density=None if fired_M is None or not tokens or tokens < 0 else density(fired_M, tokens),
        neighbours=neighbours(compared(decoder_MD, parts)),
        norms=norms(encoder_MD, decoder_MD, b_dec_D),
        skip_norm=None if skip is None else skip.norm().item(),
        sharing=parts,
    )


def _facts(config: dict[str, Any]) -> tuple[tuple[str, float, str], ...]:
    """Read the selection's numbers. Empty if the selection is not registered."""
    activation = text(config, "activation") or "topk"
    return tuple(SELECTIONS.get(activation).facts(config)) if activation in SELECTIONS else ()


def _notes(folder: Path) -> dict[str, Any]:
    """Read the facts that training wrote next to the weights. sparsify writes none."""
    file = folder / ABOUT_FILE
    return read_json(file) if file.exists() else {}


def _counters(folder: Path, num_latents: int) -> tuple[Tensor | None, Tensor | None]:
    """Read the tokens since each latent fired, and how often it fired: both `[M]`, int64, or None if not recorded."""
    file = folder / STATE_FILE
    if not file.exists():
        return None, None
    names = ("tokens_since_fired", "fire_count")
    held = read_some_tensors(file, (), optional=names)
    for name, tensor in held.items():
        if tensor.shape != (num_latents,):
            raise UserError(f"{file} does not match the weights: {name} is {list(tensor.shape)}, not [{num_latents}]")
        if tensor.dtype != torch.int64:
            raise UserError(f"{file} is damaged: {name} is {tensor.dtype}, not int64")
    return held.get(names[0]), held.get(names[1])


def _trends(location: Location, step: int | None) -> dict[str, tuple[tuple[int, float | None], ...]]:
    """Read step and FVU of each report from the run's metrics, by hookpoint, up to the checkpoint's step."""
    file = location.checkpoint.parent / METRICS_FILE
    trends: dict[str, list[tuple[int, float | None]]] = {}
    for record in read_metrics(file) if file.is_file() else ():
        if step is None or record["step"] <= step:
            for name, layer in mapping(record, "layers").items():
                if isinstance(layer, dict):
                    trends.setdefault(name, []).append((record["step"], number(layer, "fvu")))
    return {name: tuple(points) for name, points in trends.items()}


def _evaluation(location: Location, hookpoints: set[str]) -> dict[str, Any] | None:
    """Read the evaluation of the checkpoint, or of a single SAE, for the chosen layers only."""
    folders = [*location.saes.values(), location.checkpoint] if location.kind == "sae" else [location.checkpoint]
    file = next((folder / EVAL_FILE for folder in folders if (folder / EVAL_FILE).is_file()), None)
    if file is None:
        return None
    record = read_json(file)
    try:
        layers = [layer for layer in record["layers"] if layer["hookpoint"] in hookpoints]
        return {**record, "layers": layers} if record["format"] == EVAL_FORMAT and layers else None
    except (KeyError, TypeError):
        raise UserError(f"{file} is damaged: run saekit eval again") from None
