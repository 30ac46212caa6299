"""Chooses a placement from `--placement` and what the launcher says."""

from __future__ import annotations

import os
from collections.abc import Mapping

from saekit.config.ranks import AUTO, placement_names
from saekit.errors import UserError
from saekit.placement.base import Placement
from saekit.registry import PLACEMENTS

BY_DEFAULT = "ddp"
"""The placement under a launcher that names none."""
ALONE = "single"
"""The placement without a launcher."""


def connect(asked: str = AUTO, layer_map: str | None = None) -> Placement:
    """Join the other processes of this run, if there are any.

    Args:
        asked: `auto`, or a name in `saekit.registry.PLACEMENTS`.
        layer_map: Which rank trains which layers under layer-map, such as `0-5:0,6-11:1`; None balances them.

    Raises:
        UserError: If what is asked for contradicts how the process was launched; the message names both.
    """
    if asked not in (names := placement_names()):
        raise UserError(f"--placement {asked}: there is none of that name; choose one of {', '.join(names)}")
    kind = kind_of(choose(asked, os.environ))
    if layer_map is not None and not kind.takes_layer_map:
        raise UserError(f"--layer-map {layer_map} has no meaning under --placement {kind.name}")
    return kind.join(layer_map)


def kind_of(name: str) -> type[Placement]:
    """Return the class of that name, built in or from outside the package; it is imported now.

    Raises:
        UserError: If there is none, or it has another name than it is registered under.
    """
    kind: type[Placement] = PLACEMENTS.get(name)
    if kind.name != name:
        raise UserError(f"placement {name!r} calls itself {kind.name!r}: set `name` of {kind.__name__} to {name!r}")
    return kind


def kinds(ranks: int) -> tuple[type[Placement], ...]:
    """Return all placements for this number of ranks: those of one process, or those that a launcher starts."""
    every = map(kind_of, PLACEMENTS.names())
    return tuple(kind for kind in every if kind.ranked == (ranks > 1))


def with_deepspeed() -> tuple[str, ...]:
    """Names of the placements that train with DeepSpeed."""
    return tuple(kind.name for kind in kinds(2) if kind.deepspeed)


def launched_as(launch_file: Mapping[str, object]) -> str | None:
    """Return the placement that a launch file of accelerate decides on; None where it starts one process.

    It says DeepSpeed, or names the placement as the workers' role.
    """
    kind, section = launch_file.get("distributed_type"), launch_file.get("mpirun_config")
    if kind == "NO":
        return None
    if kind == "DEEPSPEED":
        return with_deepspeed()[0]
    return _role(section.get("role") if isinstance(section, dict) else None) or BY_DEFAULT


def choose(asked: str, environment: Mapping[str, str]) -> str:
    """Return the placement's name, `single` where there is one process that no launcher started.

    `auto` takes what the launch file says, and ddp under a launcher that says nothing of placements.

    Raises:
        UserError: See `connect`.
    """
    for variable, kind in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _says(environment, variable):
            possible = ", ".join(each.name for each in kinds(2))
            raise UserError(
                f"--placement {asked}, but the launch file says {kind}, which saekit does not train under: "
                f"use a launch file for one of {possible}"
            )
    said = _role(environment.get("ROLE_NAME"))
    if _says(environment, "ACCELERATE_USE_DEEPSPEED"):
        names = with_deepspeed()
        if said or asked not in (AUTO, *names):
            raise UserError(
                f"--placement {said or asked}, but the launch file says DeepSpeed, which is --placement {names[0]}: "
                "choose one of them"
            )
        return names[0] if asked == AUTO else asked
    if "LOCAL_RANK" not in environment:
        if asked != AUTO and kind_of(asked).ranked:
            raise UserError(
                f"--placement {asked}, but this is one process that no launcher started: add --launch {asked} or "
                f"{asked}-cpu, or start it with torchrun or accelerate launch"
            )
        return ALONE if asked == AUTO else asked
    if asked == AUTO:
        return said or BY_DEFAULT
    if not kind_of(asked).ranked:
        raise UserError(f"--placement {asked} is for one process, but a launcher has started this one: leave it out")
    if said not in (None, asked):
        raise UserError(f"--placement {asked}, but the launch file says {said} (role: {said}): choose one of them")
    if kind_of(asked).deepspeed and "ACCELERATE_MIXED_PRECISION" in environment:  # accelerate launch always says this
        raise UserError(
            f"--placement {asked}, but the launch file does not say DeepSpeed: use accelerate_configs/zero3.yaml, "
            "or torchrun"
        )
    return asked


def _role(name: object) -> str | None:
    """Return the placement that the workers' role names; torchrun's own default, for one, names none."""
    return name if isinstance(name, str) and name in PLACEMENTS and kind_of(name).ranked else None


def _says(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() == "true"
