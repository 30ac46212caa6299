"""What patterns of `--hookpoints` and its short names mean in a language model's structure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from saekit.activations.hookpoints import Hookpoint, select_layers
from saekit.activations.patterns import alternatives, fold, matches
from saekit.activations.structure import Structure
from saekit.errors import UserError
from saekit.sae.storage import IN

SHORT = {
    "resid": "outputs of blocks",
    "resid_pre": "inputs of blocks",
    "mlp": "outputs of the blocks' MLPs",
    "attn": "outputs of the blocks' attention",
}
"""Names that mean the same in every architecture. `mlp:in` and `attn:in` are the inputs."""
MOST_CANDIDATES = 8


class Matched(NamedTuple):
    """The hookpoints that patterns mean."""

    hookpoints: tuple[Hookpoint, ...]
    """In the order in which a forward pass comes to them."""
    depth: int
    """The number of blocks that have to be there for that."""


def choose(
    structure: Structure,
    patterns: Sequence[str],
    layers: Sequence[int] | None = None,
    stride: int = 1,
) -> Matched:
    """Choose hookpoints by patterns and short names.

    Args:
        structure: The model's.
        patterns: As in `--hookpoints`.
        layers: Numbers of blocks to choose from; None for all of them, and what is outside the blocks.
        stride: Choose from every Nth block.

    Raises:
        UserError: If a pattern cannot be read, means nothing in this model, or means what cannot be read; if a layer is
            out of range.
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
    return Matched(found, max(1, *(blocks_for(structure, name) for name in order)))


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


def blocks_for(structure: Structure, name: str) -> int:
    """Return the number of blocks that run before a hookpoint, its own included."""
    block = structure.block_of(name)
    if block is not None:
        return block + 1
    first = structure.readings[f"{structure.prefix}.0{IN}"].order
    return 0 if structure.readings[name].order < first else structure.depth


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))
