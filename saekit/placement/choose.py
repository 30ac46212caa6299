"""From `--placement` and what the launcher said to a placement."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from saekit.errors import UserError
from saekit.placement.base import Placement
from saekit.placement.single import Single

PLACEMENTS = ("auto", "ddp", "zero3", "layer-map")


def connect(asked: str = "auto", layer_map: str | None = None) -> Placement:
    """Join the other processes of this run, if there are any.

    Args:
        asked: `auto`, `ddp`, `zero3` or `layer-map`.
        layer_map: Which rank trains which layers under layer-map, such as `0-5:0,6-11:1`; None balances them.

    Raises:
        UserError: If what is asked for contradicts how the process was launched; the message names both.
    """
    if asked not in PLACEMENTS:
        raise UserError(f"--placement {asked}: there is none of that name; choose one of {', '.join(PLACEMENTS)}")
    name = choose(asked, os.environ)
    if layer_map is not None and name != "layer-map":
        raise UserError(f"--layer-map {layer_map} has no meaning under --placement {name}")
    if name == "single":
        from accelerate import Accelerator

        device = Accelerator().device
        # Apple's GPU has no float64 for the statistics.
        return Single(torch.device("cpu") if device.type == "mps" else device)
    from saekit.placement.ddp import Ddp
    from saekit.placement.layer_map import LayerMap
    from saekit.placement.world import start_world

    if name == "zero3":
        from saekit.placement.deepspeed import start_zero3

        world = start_zero3()
        from saekit.placement.zero3 import Zero3  # imports DeepSpeed, which must be told a few things first

        return Zero3(world)
    return LayerMap(start_world(), layer_map) if name == "layer-map" else Ddp(start_world())


def choose(asked: str, environment: Mapping[str, str]) -> str:
    """The placement's name, `single` where there is one process that no launcher started.

    `auto` takes what the launch file says, and ddp under a launcher that says nothing of placements.

    Raises:
        UserError: See `connect`.
    """
    for variable, kind in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM")):
        if _says(environment, variable):
            raise UserError(
                f"--placement {asked}, but the launch file says {kind}, which saekit does not train under: "
                "use a launch file for ddp, zero3 or layer-map"
            )
    said = "layer-map" if environment.get("ROLE_NAME") == "layer-map" else None
    if _says(environment, "ACCELERATE_USE_DEEPSPEED"):
        if said or asked not in ("auto", "zero3"):
            raise UserError(
                f"--placement {said or asked}, but the launch file says DeepSpeed, which is --placement zero3: "
                "choose one of them"
            )
        return "zero3"
    if "LOCAL_RANK" not in environment:
        if asked != "auto":
            raise UserError(
                f"--placement {asked}, but this is one process that no launcher started: add --launch {asked} or "
                f"{asked}-cpu, or start it with torchrun or accelerate launch"
            )
        return "single"
    if asked in ("ddp", "zero3") and said == "layer-map":
        raise UserError(
            f"--placement {asked}, but the launch file says layer-map (role: layer-map): choose one of them"
        )
    if asked == "zero3" and "ACCELERATE_MIXED_PRECISION" in environment:  # accelerate launch always says this
        raise UserError(
            "--placement zero3, but the launch file does not say DeepSpeed: use accelerate_configs/zero3.yaml, "
            "or torchrun"
        )
    return said or "ddp" if asked == "auto" else asked


def _says(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() == "true"
