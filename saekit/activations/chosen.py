"""The hookpoints of a run: what `--hookpoints`, `--layers` and `--layer-stride` mean in a language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from saekit.activations.hookpoints import Hookpoint, block_outputs, find_blocks, select_layers, text_config_of, width
from saekit.activations.lm import ModelShape, hookpoint_names
from saekit.activations.patterns import alternatives, fold, matches
from saekit.activations.structure import Reading, Structure, measure
from saekit.config import TrainConfig
from saekit.errors import UserError, first_line
from saekit.sae.storage import IN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT = {
    "resid": "outputs of blocks",
    "resid_pre": "inputs of blocks",
    "mlp": "outputs of the blocks' MLPs",
    "attn": "outputs of the blocks' attention",
}
"""Names that mean the same in every architecture. `mlp:in` and `attn:in` are the inputs."""
MOST_CANDIDATES = 8


class Chosen(NamedTuple):
    """The hookpoints of a run."""

    hookpoints: tuple[Hookpoint, ...]
    """In the order in which a forward pass comes to them."""
    depth: int
    """The number of blocks that have to be there for that."""


def chosen(cfg: TrainConfig, shape: ModelShape) -> Chosen:
    """Choose a run's hookpoints from the model's config alone.

    Raises:
        UserError: If a pattern cannot be read, means nothing in this model, or means what cannot be read; if a layer is
            out of range.
    """
    if cfg.hookpoints is not None:
        structure = measure(None, shape.config)
        return choose(structure, cfg.hookpoints, cfg.layers, cfg.layer_stride)
    layers = select_layers(shape.num_layers, cfg.layers, cfg.layer_stride)
    names = hookpoint_names(shape, layers)
    return Chosen(tuple(Hookpoint(name, shape.d_in) for name in names), layers[-1] + 1)


def chosen_in(cfg: TrainConfig, model: PreTrainedModel) -> tuple[Hookpoint, ...]:
    """Choose a run's hookpoints in a model that is loaded, at least as far as the last of them.

    Raises:
        UserError: As `chosen`.
    """
    if cfg.hookpoints is None:
        return block_outputs(model, cfg.layers, cfg.layer_stride)
    return choose(structure_of(model), cfg.hookpoints, cfg.layers, cfg.layer_stride).hookpoints


def structure_of(model: PreTrainedModel) -> Structure:
    """Measure a model that is loaded, by its class and its config: its weights are not touched.

    Raises:
        UserError: If its class cannot be called with its config alone; see also `find_blocks`.
    """
    kind = type(model.base_model)
    try:
        return measure(kind, model.base_model.config)
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{kind.__name__} cannot be made of its config alone ({first_line(error)}), which hookpoints other than "
            "blocks' outputs need"
        ) from error


def check_widths(model: PreTrainedModel, widths: Mapping[str, int]) -> None:
    """Check that SAEs have their hookpoints in a model that is loaded, of their widths.

    Args:
        model: Any HuggingFace model.
        widths: D of each SAE, by hookpoint.

    Raises:
        UserError: If there is no such hookpoint, it cannot be read, or it has another width.
    """
    blocks = find_blocks(model)
    outputs = [blocks.hookpoint(layer) for layer in range(len(blocks.modules))]
    readings = {name: Reading(name, width(text_config_of(model.config)), None, 0) for name in outputs}
    if not all(Hookpoint(name, 0).is_block for name in widths):
        readings |= structure_of(model).readings
    for name, own in widths.items():
        found = readings.get(name)
        if found is None:
            raise UserError(
                f"the SAE of {name} does not belong to this model, whose layers are {outputs[0]} to {outputs[-1]}"
            )
        if found.reason is not None:
            raise UserError(f"the SAE of {name} cannot be used in this model: {name.removesuffix(IN)} {found.reason}")
        if own != found.width:
            raise UserError(f"the SAE of {name} is for a width of {own}, and this model's is {found.width}")


def off_stream(model: PreTrainedModel, hookpoint: str) -> str | None:
    """Say why activations at a hookpoint are no part of the residual stream; None if they are.

    They are if they are a block's output or input, or are added to the stream as they are, or times a number.
    """
    blocks = find_blocks(model)
    if hookpoint.removesuffix(IN) in {blocks.hookpoint(layer) for layer in range(len(blocks.modules))}:
        return None
    structure = structure_of(model)
    if hookpoint in structure.writers:
        return None
    wide = structure.readings[hookpoint].width
    if wide != structure.width:
        return f"it is {wide} wide, and the residual stream {structure.width}"
    return "it is not added to the residual stream as it is"


def choose(
    structure: Structure, patterns: Sequence[str], layers: Sequence[int] | None = None, stride: int = 1
) -> Chosen:
    """Choose hookpoints by patterns and short names.

    Args:
        structure: The model's.
        patterns: As in `--hookpoints`.
        layers: Numbers of blocks to choose from; None for all of them, and what is outside the blocks.
        stride: Choose from every Nth block.

    Raises:
        UserError: As `chosen`.
    """
    blocks = select_layers(structure.depth, layers, stride)
    narrowed = layers is not None or stride > 1
    names: dict[str, None] = {}
    for pattern in patterns:
        own = matched(structure, pattern, blocks)
        _refuse(structure, pattern, own)
        names |= dict.fromkeys(name for name in own if not narrowed or structure.block_of(name) in blocks)
    if not names:
        where = f" in the blocks {_listed(blocks)}" if narrowed else ""
        raise UserError(f"--hookpoints {','.join(patterns)} names no hookpoint{where}")
    order = sorted(names, key=lambda name: structure.readings[name].order)
    found = tuple(Hookpoint(name, structure.readings[name].width or 0) for name in order)
    return Chosen(found, max(1, *(_blocks_for(structure, name) for name in order)))


def matched(structure: Structure, pattern: str, blocks: Sequence[int] | None = None) -> list[str]:
    """Return the names of the hookpoints that a pattern or a short name means, whether they can be read or not.

    Args:
        structure: The model's.
        pattern: One part of `--hookpoints`.
        blocks: Where short names are looked for; None for all blocks.

    Raises:
        UserError: If it cannot be read, or there is nothing of that name.
    """
    path, side = pattern.removesuffix(IN), IN if pattern.endswith(IN) else ""
    if path in SHORT:
        return _short(structure, path, side, range(structure.depth) if blocks is None else blocks)
    names: list[str] = []
    for alternative in alternatives(pattern):
        own = [name for name in structure.readings if matches(alternative, name)]
        if not own:
            text = pattern if pattern == alternative else f"{pattern} ({alternative})"
            raise UserError(
                f"--hookpoints {text}: there is no such module; there are {_near(structure, alternative)}; `saekit "
                f"hookpoints MODEL` shows all, and the short names are {', '.join(SHORT)}"
            )
        names += own
    return names


def _short(structure: Structure, name: str, side: str, blocks: Sequence[int]) -> list[str]:
    if name == "resid_pre" and side:
        raise UserError("--hookpoints resid_pre:in: resid_pre is the blocks' input already: leave out :in")
    if name in ("resid", "resid_pre"):
        return [f"{structure.prefix}.{block}{IN if name == 'resid_pre' else side}" for block in blocks]
    names = []
    for block in blocks:
        branches = [each for each in structure.branches if each.block == block]
        own = [each.module for each in branches if (each.is_mlp if name == "mlp" else each.attends)]
        if len(own) != 1:
            part = "MLP" if name == "mlp" else "attention"
            found = f"no one module that is its {part}" if not own else f"several modules that may be its {part}"
            raise UserError(
                f"--hookpoints {name}: {structure.prefix}.{block} has {found}; name modules by their paths: "
                f"{_candidates(structure)}"
            )
        names.append(own[0] + side)
    return names


def _candidates(structure: Structure) -> str:
    """Name what writes to the residual stream; where nothing does directly, what is as wide as it inside a block."""
    found = [branch.module for branch in structure.branches]
    if not found:
        start = structure.prefix.count(".") + 2
        found = [
            name
            for name, reading in structure.readings.items()
            if reading.width == structure.width
            and structure.block_of(name) is not None
            and not name.endswith(IN)
            and name.count(".") == start
        ]
    return ", ".join(list(fold(found))[:MOST_CANDIDATES])


def _near(structure: Structure, alternative: str) -> str:
    """Name what there is where the path goes wrong."""
    parts = alternative.removesuffix(IN).split(".")
    for end in range(len(parts) - 1, -1, -1):
        start = ".".join(parts[:end])
        inside = [name for name in structure.readings if matches(f"{start}.*".lstrip("."), name)]
        if inside:
            some = list(fold(inside))
            return ", ".join(some[:MOST_CANDIDATES]) + (", ..." if len(some) > MOST_CANDIDATES else "")
    return "none"


def _refuse(structure: Structure, pattern: str, names: Iterable[str]) -> None:
    refused = {name: reason for name in names if (reason := structure.readings[name].reason) is not None}
    if refused:
        name, reason = next(iter(refused.items()))
        same = [each for each, other in refused.items() if other == reason]
        raise UserError(
            f"--hookpoints {pattern}: {', '.join(fold(same))} cannot be read: {name} {reason}"
            + (f"; nor can {len(refused) - len(same)} others" if len(refused) > len(same) else "")
        )


def _blocks_for(structure: Structure, name: str) -> int:
    """Return the number of blocks that run before a hookpoint, its own included."""
    block = structure.block_of(name)
    if block is not None:
        return block + 1
    first = structure.readings[f"{structure.prefix}.0{IN}"].order
    return 0 if structure.readings[name].order < first else structure.depth


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))
