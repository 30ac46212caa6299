"""Options that say where SAEs live. Names are checked against the registry; no placement is imported."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from saekit.errors import UserError
from saekit.registry import PLACEMENTS

AUTO = "auto"
"""The default of `--placement`: what the launch file says."""


def placement_names() -> tuple[str, ...]:
    """Return the values of `--placement`: `auto`, the built-in placements and those of plug-ins."""
    return (AUTO, *PLACEMENTS.names())


def _check_name(name: str) -> str:
    if name not in placement_names():
        raise ValueError(f"there is no placement of that name: choose one of {', '.join(placement_names())}")
    return name


PlacementName = Annotated[str, AfterValidator(_check_name)]
"""`auto`, or a name in `saekit.registry.PLACEMENTS`."""


def check_placement(placement: str, layer_map: str | None, shard_lm: bool) -> None:
    """Refuse options that contradict a built-in placement; `Placement.supports` speaks for every other.

    Raises:
        ValueError: If two of them contradict each other.
    """
    if layer_map is not None and placement in ("single", "ddp", "zero3"):
        raise ValueError(f"--layer-map {layer_map} contradicts --placement {placement}: give one of them")
    if shard_lm and placement in ("single", "ddp", "layer-map"):
        raise ValueError(f"--shard-lm contradicts --placement {placement}: only zero3 shards")


def distribute_layers(typed: dict[str, Any]) -> None:
    """Set what `--distribute-layers` is short for.

    Args:
        typed: The options on the command line, by name; changed in place.

    Raises:
        UserError: If another placement is among them.
    """
    if typed.setdefault("placement", "layer-map") != "layer-map":
        raise UserError(f"--distribute-layers contradicts --placement {typed['placement']}: give one of them")
