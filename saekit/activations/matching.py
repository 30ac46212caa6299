"""Find the hookpoints that patterns and short names of `--hookpoints` mean in a language model."""

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
"""The most names that a message lists."""


class Matched(NamedTuple):
    """The hookpoints that patterns match."""

    hookpoints: tuple[Hookpoint, ...]
    """The hookpoints, in the order in which a forward pass reaches them."""
    depth: int
    """The number of blocks that they need."""


def choose(
    structure: Structure,
    patterns: Sequence[str],
    layers: Sequence[int] | None = None,
    stride: int = 1,
) -> Matched:
    """Choose hookpoints by patterns and short names.

    Args:
        structure: The model's structure.
        patterns: As in `--hookpoints`.
        layers: Numbers of the blocks to choose from. None for all blocks and everything outside them.
        stride: Choose only from every Nth block.

    Raises:
        UserError: If a pattern is invalid, matches nothing in this model, or matches something that cannot be read, or
            if a layer is out of range.
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
        raise UserError(f"--hookpoints {','.join(patterns)} matches no hookpoint{where}")
    order = sorted(names, key=lambda name: structure.readings[name].order)
    found = tuple(Hookpoint(name, structure.readings[name].width or 0) for name in order)
    return Matched(found, max(1, *(blocks_for(structure, name) for name in order)))


def matched(structure: Structure, pattern: str, blocks: Sequence[int] | None = None) -> list[str]:
    """Return the names of the hookpoints that a pattern or a short name matches, including unreadable ones.

    Args:
        structure: The model's structure.
        pattern: One pattern of `--hookpoints`.
        blocks: The blocks in which short names are looked up. None for all blocks.

    Raises:
        UserError: If the pattern is invalid or matches nothing.
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
                f"--hookpoints {text}: there is no such module, but there are {_near(structure, alternative)}. Run "
                f"`saekit hookpoints MODEL` to see all; the short names are {', '.join(SHORT)}"
            )
        names += own
    return names


def _short(structure: Structure, name: str, side: str, blocks: Sequence[int]) -> list[str]:
    if name == "resid_pre" and side:
        raise UserError("--hookpoints resid_pre:in: resid_pre already is the blocks' input: leave out :in")
    if name in ("resid", "resid_pre"):
        return [f"{structure.prefix}.{block}{IN if name == 'resid_pre' else side}" for block in blocks]
    names = []
    for block in blocks:
        branches = [each for each in structure.branches if each.block == block]
        own = [each.module for each in branches if (each.is_mlp if name == "mlp" else each.attends)]
        if len(own) != 1:
            part = "MLP" if name == "mlp" else "attention"
            found = f"no single module that is its {part}" if not own else f"several modules that may be its {part}"
            raise UserError(
                f"--hookpoints {name}: {structure.prefix}.{block} has {found}. Use the modules' paths: "
                f"{_candidates(structure)}"
            )
        names.append(own[0] + side)
    return names


def _candidates(structure: Structure) -> str:
    """List the modules that write to the residual stream, or if none does directly, those in a block with its width."""
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
    """List the names that exist at the point where a path goes wrong."""
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
    """Return the number of blocks that a hookpoint needs: those up to its own."""
    block = structure.block_of(name)
    if block is not None:
        return block + 1
    first = structure.readings[f"{structure.prefix}.0{IN}"].order
    return 0 if structure.readings[name].order < first else structure.depth


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))
