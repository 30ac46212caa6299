"""Compares the cost of recipes: a step of the defaults, of AuxK and of other kinds of SAEs with a plain TopK step.

    python benchmarks/recipe_cost.py                   three sizes, a tenth of the latents dead
    python benchmarks/recipe_cost.py --dead 0.5

The first three recipes differ in how they treat dead latents and tokens of large norm, and in the learning rates. The
others are the defaults with another `--activation` or with nested dictionaries. All steps run in turn in one process.
The dead latents are given and the learning rate is tiny, so that the work of a step does not change.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import typer
from common import activations, auto_type, spread
from measure import synchronize
from one_unit import OneUnit
from recipes import NESTED, REFERENCE
from rich.console import Console
from rich.table import Table

from saekit import SaeConfig, TrainConfig
from saekit.sae.kernels import choose_kernels

SIZES = [(128, 4096, 32, 2048), (512, 16384, 32, 4096), (768, 24576, 32, 2048)]
RECIPES: dict[str, dict[str, Any]] = {
    "plain TopK": REFERENCE,
    "defaults": {},
    "Gao et al., AuxK": {**REFERENCE, "auxk_alpha": 1 / 32},
    "batchtopk": {"sae": SaeConfig(activation="batchtopk")},
    "groupmax": {"sae": SaeConfig(activation="groupmax")},
    "matryoshka": {"sae": SaeConfig(matryoshka=NESTED)},
}
TINY_RATE = 1e-9


def make_unit(recipe: dict[str, Any], x_ND: torch.Tensor, num_latents: int, k: int, dead: float) -> OneUnit:
    """Make the unit that a recipe trains."""
    cfg = TrainConfig(**{**recipe, "lr": TINY_RATE})
    select = auto_type(f"{x_ND.shape[1]},{num_latents},{k},{len(x_ND)}", x_ND.device)
    return OneUnit(cfg, x_ND, num_latents, k, choose_kernels("auto", select, x_ND.device), dead)


def seconds_of(unit: OneUnit, device: torch.device) -> float:
    """Return the seconds of one optimizer step."""
    synchronize(device)
    start = time.perf_counter()
    unit.step()
    synchronize(device)
    return time.perf_counter() - start


def main(
    dead: Annotated[float, typer.Option(help="Share of the latents that are dead.")] = 0.1,
    repeats: Annotated[int, typer.Option(help="Timed steps of each recipe.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Print the time of each recipe's step, and its ratio to the plain step."""
    shown = Table("D, M, k, N", title=f"{dead:.0%} of the latents dead", title_justify="left")
    for name in RECIPES:
        shown.add_column(name, justify="right")
    for d_in, num_latents, k, tokens in SIZES:
        x_ND = activations(tokens, d_in).to(device)
        units = {name: make_unit(recipe, x_ND, num_latents, k, dead) for name, recipe in RECIPES.items()}
        seconds: dict[str, list[float]] = {name: [] for name in units}
        for turn in range(repeats + 2):
            for name, unit in units.items():
                taken = seconds_of(unit, x_ND.device)
                if turn >= 2:  # the first steps allocate memory
                    seconds[name].append(taken)
        plain = seconds["plain TopK"]
        cells = []
        for own in seconds.values():
            ratios = spread([mine / its for mine, its in zip(own, plain, strict=True)])
            milliseconds = 1e3 * statistics.median(own)
            cells.append(f"{milliseconds:.0f} ms ({ratios['median']:.2f}, {ratios['min']:.2f} to {ratios['max']:.2f})")
        shown.add_row(f"{d_in}, {num_latents}, {k}, {tokens}", *cells)
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
