"""Choose the sites of a run: what `--hookpoints`, `--transcode`, `--layers` and so on mean in a language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from saekit.activations.hookpoints import (
    OTHER,
    Hookpoint,
    block_outputs,
    find_blocks,
    select_layers,
    text_config_of,
    width,
)
from saekit.activations.lm import ModelShape, hookpoint_names
from saekit.activations.matching import Matched, blocks_for, choose
from saekit.activations.pair import Models, paired
from saekit.activations.patterns import fold
from saekit.activations.sites import Site, autoencoder, crosscoder, hookpoints_of, transcoder
from saekit.activations.structure import Reading, Structure, measure
from saekit.config.coders import CodersConfig
from saekit.errors import UserError, first_line
from saekit.sae.storage import IN
from saekit.units import plural

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Chosen(NamedTuple):
    """The sites of a run."""

    sites: tuple[Site, ...]
    """The sites, in the order in which a forward pass reaches what they write."""
    depth: int
    """The number of blocks that they need."""
    other_depth: int = 0
    """The number of blocks that they need of a second model."""

    @property
    def hookpoints(self) -> tuple[Hookpoint, ...]:
        """Return the hookpoints of the sites."""
        return hookpoints_of(self.sites)


def chosen(cfg: CodersConfig, shape: ModelShape, other: ModelShape | None = None) -> Chosen:
    """Choose a run's sites from the model's config alone.

    Args:
        cfg: The run's configuration.
        shape: The model's shape.
        other: The second model's shape, for crosscoders of two models.

    Raises:
        UserError: If a pattern is invalid, matches nothing in this model, or matches something that cannot be read; if
            a layer is out of range; if hookpoints to read and to write do not form pairs in the right order; or if the
            second model has no such hookpoint.
    """
    found = _chosen(cfg, shape)
    if other is None:
        return found
    if all(each.is_block for each in found.hookpoints):
        names = hookpoint_names(other, range(other.num_layers))
        readings = _outputs(names, other.d_in)
        depth = 1 + max(names.index(each.name) if each.name in names else 0 for each in found.hookpoints)
    else:
        structure = measure(None, other.config)
        readings = {**structure.readings}
        there = [each.name for each in found.hookpoints if each.name in readings]
        depth = max([1, *(blocks_for(structure, name) for name in there)])
    return Chosen(paired(found.hookpoints, readings, str(cfg.crosscode_models)), found.depth, depth)


def _chosen(cfg: CodersConfig, shape: ModelShape) -> Chosen:
    if names_none(cfg):
        layers = select_layers(shape.num_layers, cfg.layers, cfg.layer_stride)
        names = hookpoint_names(shape, layers)
        return Chosen(tuple(autoencoder(Hookpoint(name, shape.d_in)) for name in names), layers[-1] + 1)
    return choose_sites(measure(None, shape.config), cfg)


def chosen_in(cfg: CodersConfig, model: PreTrainedModel, other: PreTrainedModel | None = None) -> tuple[Site, ...]:
    """Choose a run's sites in a model that is loaded, at least up to the last of them.

    Args:
        cfg: The run's configuration.
        model: The model.
        other: The second model, for crosscoders of two models.

    Raises:
        UserError: See `chosen`.
    """
    if names_none(cfg):
        sites = tuple(map(autoencoder, block_outputs(model, cfg.layers, cfg.layer_stride)))
    else:
        sites = choose_sites(structure_of(model), cfg).sites
    if other is None:
        return sites
    hookpoints = hookpoints_of(sites)
    return paired(hookpoints, readings_in(other, hookpoints), str(cfg.crosscode_models))


def readings_in(model: PreTrainedModel, hookpoints: Iterable[Hookpoint]) -> dict[str, Reading]:
    """Return the readings of a loaded model, by hookpoint.

    If all hookpoints are block outputs, return only those, which saves measuring the model's structure.
    """
    readings = _outputs(_blocks(model), width(text_config_of(model.config)))
    if all(each.is_block for each in hookpoints):
        return readings
    return {**readings, **structure_of(model).readings}


def _blocks(model: PreTrainedModel) -> list[str]:
    blocks = find_blocks(model)
    return [blocks.hookpoint(layer) for layer in range(len(blocks.modules))]


def _outputs(blocks: Sequence[str], wide: int) -> dict[str, Reading]:
    return {name: Reading(name, wide, None, order) for order, name in enumerate(blocks)}


def names_none(cfg: CodersConfig) -> bool:
    """Return whether the run trains SAEs on block outputs, for which the model's structure need not be measured."""
    return cfg.hookpoints is None and cfg.crosscode is None and not cfg.transcodes


def choose_sites(structure: Structure, cfg: CodersConfig) -> Chosen:
    """Choose the sites of a run in a measured model.

    Raises:
        UserError: See `chosen`.
    """

    def named(patterns: Sequence[str], option: str) -> Matched:
        try:
            return choose(structure, patterns, cfg.layers, cfg.layer_stride)
        except UserError as error:
            raise UserError(str(error).replace("--hookpoints", option, 1)) from None

    if cfg.crosscode is not None:
        found = named(cfg.crosscode, "--crosscode")
        return Chosen((crosscoder(found.hookpoints),), found.depth)
    if cfg.reads is not None and cfg.writes is not None:
        read, written = named(cfg.reads, "--reads"), named(cfg.writes, "--writes")
        return Chosen(_pairs(structure, read.hookpoints, written.hookpoints), max(read.depth, written.depth))
    if not cfg.transcode:
        found = named(cfg.hookpoints or ("resid",), "--hookpoints")
        return Chosen(tuple(map(autoencoder, found.hookpoints)), found.depth)
    patterns = cfg.hookpoints or ("mlp",)
    if inputs := [pattern for pattern in patterns if pattern.endswith(IN) or pattern == "resid_pre"]:
        raise UserError(
            f"--transcode --hookpoints {inputs[0]}: --transcode trains from a module's input to its output. Name "
            "the modules without :in, or use --reads and --writes"
        )
    found = named(patterns, "--hookpoints")
    read = named([f"{pattern}{IN}" for pattern in patterns], "--hookpoints")
    inputs_of = {each.module: each for each in read.hookpoints}
    return Chosen(tuple(transcoder(inputs_of[each.module], each) for each in found.hookpoints), found.depth)


def _pairs(structure: Structure, read: Sequence[Hookpoint], written: Sequence[Hookpoint]) -> tuple[Site, ...]:
    if len(read) != len(written):
        raise UserError(
            f"--reads names {plural(len(read), 'hookpoint')} ({', '.join(fold([each.name for each in read]))}) and "
            f"--writes {len(written)} ({', '.join(fold([each.name for each in written]))}): name as many, to form pairs"
        )
    for one, other in zip(read, written, strict=True):
        if structure.readings[one.name].order >= structure.readings[other.name].order:
            raise UserError(
                f"--reads {one.name} --writes {other.name}: the input must come before the target, but the model "
                f"computes {other.name} first"
                if one != other
                else f"--reads and --writes both name {one.name}: use --hookpoints instead to train SAEs"
            )
    return tuple(transcoder(one, other) for one, other in zip(read, written, strict=True))


def structure_of(model: PreTrainedModel) -> Structure:
    """Measure a loaded model's structure from its class and config, without using its weights.

    Raises:
        UserError: If its class cannot be called with its config alone. See also `find_blocks`.
    """
    kind = type(model.base_model)
    try:
        return measure(kind, model.base_model.config)
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{kind.__name__} cannot be created from its config alone ({first_line(error)}), as is needed for "
            "hookpoints other than block outputs"
        ) from error


def check_widths(models: Models, sites: Iterable[Site]) -> None:
    """Check that a loaded model has the hookpoints of coders, in the right widths and order.

    Args:
        models: Any HuggingFace model, or two.
        sites: The sites of the coders.

    Raises:
        UserError: If a hookpoint does not exist, cannot be read, or has another width, or if a transcoder's input comes
            after its target.
    """
    sites = tuple(sites)
    readings = {
        f"{prefix}{name}": reading
        for prefix, model in models.items()
        for name, reading in readings_in(model, hookpoints_of(sites)).items()
    }
    for site in sites:
        for part in site.parts:
            what = f"the {site.kind} of {site.name}"
            does = (
                "" if part.name == site.name else f" {'reads' if part in site.reads else 'writes'} {part.name}, which"
            )
            found = readings.get(part.name)
            if found is None:
                outputs = _blocks(models[OTHER] if part.name.startswith(OTHER) else models[""])
                raise UserError(
                    f"{what}{does} does not belong to this model, whose layers are {outputs[0]} to {outputs[-1]}"
                )
            if found.reason is not None:
                reason = f"{part.name.removesuffix(IN)} {found.reason}"
                raise UserError(f"{what} cannot be used in this model: {reason}")
            if part.width != found.width:
                has = f"{what}{does or ' is for a width of'}{' has a width of' if does else ''}"
                raise UserError(f"{has} {part.width}, but this model's is {found.width}")
        if site.transcodes:
            _check_order(site, readings)


def _check_order(site: Site, readings: Mapping[str, Reading]) -> None:
    last = max(site.reads, key=lambda part: readings[part.name].order)
    first = min(site.writes, key=lambda part: readings[part.name].order)
    if readings[last.name].order >= readings[first.name].order:
        raise UserError(
            f"the transcoder of {site.name} reads {last.name} and predicts {first.name}, but this model computes "
            f"{first.name} first"
        )


def off_stream(model: PreTrainedModel, hookpoint: str) -> str | None:
    """Return why activations at a hookpoint are not part of the residual stream, or None if they are.

    They are if they are a block's output or input, or if they are added to the stream, possibly times a constant.
    """
    if hookpoint.removesuffix(IN) in _blocks(model):
        return None
    structure = structure_of(model)
    if hookpoint in structure.writers:
        return None
    wide = structure.readings[hookpoint].width
    if wide != structure.width:
        return f"its width is {wide}, but that of the residual stream is {structure.width}"
    return "it is not added to the residual stream unchanged"
