"""Choose a placement from `--placement` and the launcher's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping

from saekit.config.ranks import AUTO, placement_names
from saekit.errors import UserError
from saekit.placement.base import Placement
from saekit.registry import PLACEMENTS

WITH_LAUNCHER = "ddp"
"""The default placement under a launcher."""
WITHOUT_LAUNCHER = "single"
"""The default placement without a launcher."""


def connect(asked: str = AUTO, layer_map: str | None = None) -> Placement:
    """Join the other processes of this run, if there are any.

    Args:
        asked: `auto`, or a name in `saekit.registry.PLACEMENTS`.
        layer_map: The rank of each layer under layer-map, such as `0-5:0,6-11:1`; None balances the layers.

    Raises:
        UserError: If there is no such placement, or it contradicts how the process was launched. The message names
            both.
    """
    if asked not in (names := placement_names()):
        raise UserError(f"--placement {asked}: there is none of that name; choose one of {', '.join(names)}")
    kind = kind_of(choose(asked, os.environ))
    if layer_map is not None and not kind.takes_layer_map:
        raise UserError(f"--layer-map {layer_map} has no meaning under --placement {kind.name}: leave it out")
    return kind.join(layer_map)


def kind_of(name: str) -> type[Placement]:
    """Import and return the placement class of that name, built in or from a plug-in.

    Raises:
        UserError: If there is none, or its `name` is not the name that it is registered under.
    """
    kind: type[Placement] = PLACEMENTS.get(name)
    if kind.name != name:
        raise UserError(f"placement {name!r} has the name {kind.name!r}: set `name` of {kind.__name__} to {name!r}")
    return kind


def kinds(ranks: int) -> tuple[type[Placement], ...]:
    """Return all placements for a number of ranks: those of one process, or those that a launcher starts."""
    every = map(kind_of, PLACEMENTS.names())
    return tuple(kind for kind in every if kind.ranked == (ranks > 1))


def with_deepspeed() -> tuple[str, ...]:
    """Return the names of the placements that train with DeepSpeed."""
    return tuple(kind.name for kind in kinds(2) if kind.deepspeed)


def launched_as(launch_file: Mapping[str, object]) -> str | None:
    """Return the placement that a launch file of accelerate names; None if it starts one process.

    The file either enables DeepSpeed or names the placement as the workers' role.
    """
    kind, section = launch_file.get("distributed_type"), launch_file.get("mpirun_config")
    if kind == "NO":
        return None
    if kind == "DEEPSPEED":
        return with_deepspeed()[0]
    return _role(section.get("role") if isinstance(section, dict) else None) or WITH_LAUNCHER


def choose(asked: str, environment: Mapping[str, str]) -> str:
    """Return the name of the placement: `single` if no launcher has started this process.

    `auto` takes the placement of the launch file, or ddp if a launcher names none.

    Args:
        asked: `auto`, or the name of a placement.
        environment: Environment variables, which hold the launcher's settings.

    Raises:
        UserError: See `connect`.
    """
    for variable, kind in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _is_set(environment, variable):
            possible = ", ".join(each.name for each in kinds(2))
            raise UserError(
                f"--placement {asked}, but the launch file says {kind}, which saekit does not support: "
                f"use a launch file for one of {possible}"
            )
    said = _role(environment.get("ROLE_NAME"))
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
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
                f"--placement {asked} needs several processes, but no launcher has started this one: "
                f"add --launch {asked} or {asked}-cpu, or start with torchrun or accelerate launch"
            )
        return WITHOUT_LAUNCHER if asked == AUTO else asked
    if asked == AUTO:
        return said or WITH_LAUNCHER
    if not kind_of(asked).ranked:
        raise UserError(f"--placement {asked} is for one process, but a launcher has started this one: leave it out")
    if said not in (None, asked):
        raise UserError(f"--placement {asked}, but the launch file says {said} (role: {said}): choose one of them")
    if kind_of(asked).deepspeed and "ACCELERATE_MIXED_PRECISION" in environment:  # accelerate launch always sets it
        raise UserError(
            f"--placement {asked}, but the launch file does not say DeepSpeed: use accelerate_configs/zero3.yaml "
            "or torchrun"
        )
    return asked


def _role(name: object) -> str | None:
    """Return the placement that the workers' role names; None if it names none, like torchrun's default role."""
    return name if isinstance(name, str) and name in PLACEMENTS and kind_of(name).ranked else None


def _is_set(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() == "true"
