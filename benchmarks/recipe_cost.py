"""What recipes cost: the default's step, AuxK's and other kinds of SAEs' against a plain TopK step, in turn.

    python benchmarks/recipe_cost.py                   three sizes, a tenth of the latents dead
    python benchmarks/recipe_cost.py --dead 0.5

The first three differ in what happens to dead latents and to long activations, and in the optimiser's rates; the others
are the default's with another `--activation` or with nested dictionaries. All in one process. Which latents are dead is
given, so that all do the same work throughout. The learning rate is tiny, for the same reason.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from common import activations, spread
from measure import synchronize
from recipes import NESTED, REFERENCE
from rich.console import Console
from rich.table import Table

from saekit import Sae, SaeConfig, TrainConfig
from saekit.sae import sae_losses
from saekit.sae.kernels import choose_kernels
from saekit.training.optimizers import make_optimizer
from saekit.training.statistics import covered

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


class Step:
    """One optimiser step of one SAE, as the trainer makes it."""

    def __init__(self, recipe: dict[str, Any], x_ND: torch.Tensor, num_latents: int, k: int, dead: float) -> None:
        self.cfg = TrainConfig(**{**recipe, "lr": TINY_RATE})
        self.x_ND = x_ND
        shape = replace(self.cfg.sae, k=k)
        self.sae = Sae(**shape.sizes(x_ND.shape[1], num_latents), generator=torch.Generator().manual_seed(0))
        self.sae.train().chosen_kernels = choose_kernels("auto", "auto", x_ND.device)
        self.sae.b_dec.data.copy_(x_ND.mean(0))
        self.sae.prefixes = shape.resolve_prefixes(num_latents)
        self.sae.fit_selection_(x_ND[:512].cpu(), float(x_ND.std()))
        if self.cfg.max_norm_multiple > 0:
            self.sae.max_norm = self.cfg.max_norm_multiple * float(x_ND.norm(dim=1).median())
        self.sae.to(x_ND.device)
        self.dead = torch.arange(int(dead * num_latents), device=x_ND.device)
        self.is_dead = torch.arange(num_latents, device=x_ND.device) < len(self.dead)
        self.sae.b_enc.data[self.dead] = -1e3
        self.optimizer = make_optimizer(self.cfg, self.sae)
        self.scale = 1 / float((x_ND - x_ND.mean(0)).square().sum())

    def __call__(self) -> float:
        """Do it; returns seconds."""
        synchronize(self.x_ND.device)
        start = time.perf_counter()
        x_ND, covered_N1 = covered(self.sae, self.x_ND)
        is_dead = self.is_dead if self.cfg.revive_alpha > 0 else None
        out = self.sae(x_ND, is_dead, aux=self.dead if self.cfg.auxk_alpha > 0 else None).only(covered_N1)
        losses = sae_losses(
            x_ND,
            out,
            scale=self.scale,
            auxk_alpha=self.cfg.auxk_alpha,
            num_dead=len(self.dead),
            revive_alpha=self.cfg.revive_alpha,
            revive_scale=1 / len(self.x_ND),
        )
        losses.total.backward()
        self.optimizer.prepare(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.x_ND.device)
        return time.perf_counter() - start


def main(
    dead: Annotated[float, typer.Option(help="Share of the latents that are dead.")] = 0.1,
    repeats: Annotated[int, typer.Option(help="Steps of each that count.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Print the step of each recipe, and its ratio to the plain one's."""
    shown = Table("D, M, k, N", title=f"{dead:.0%} of the latents dead", title_justify="left")
    for name in RECIPES:
        shown.add_column(name, justify="right")
    for d_in, num_latents, k, tokens in SIZES:
        x_ND = activations(tokens, d_in).to(device)
        steps = {name: Step(recipe, x_ND, num_latents, k, dead) for name, recipe in RECIPES.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(repeats + 2):
            for name, step in steps.items():
                taken = step()
                if turn >= 2:  # the first allocate
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
