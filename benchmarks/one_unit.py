"""Trains one unit on given activations with the loop's own `train_step`, so that benchmarks time real training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saekit import Sae, TrainConfig
from saekit.activations.source import Activations, Source
from saekit.sae.kernels import Kernels
from saekit.training.bank import ONLY_UNIT, bank_of_one
from saekit.training.trainer import train_step
from saekit.training.unit import Calibration

NEVER = 10**12
"""A dead threshold, in tokens, that no latent reaches by itself."""
SAMPLE = 512
"""The number of tokens that a selection is fitted to."""


class Given(Source):
    """A source that gives the same activations in every step.

    Args:
        x_ND: `[N, D]`, in the type of a language model's activations.
    """

    name = data_name = "given"

    def __init__(self, x_ND: Tensor) -> None:
        self.x_ND = x_ND

    def begin(self, *args: Any) -> None:
        """Do nothing, since the activations do not depend on the run."""

    def read(self, step: int) -> list[None]:
        """Return one micro-batch, which needs no description."""
        return [None]

    def checksum(self, step: int) -> str:
        """Return the same value for all steps, since they are equal."""
        return ""

    def count(self, batch: None) -> int:
        """Return N."""
        return len(self.x_ND)

    def __call__(self, batch: None) -> Activations:
        """Return the activations, `[N, D]`."""
        return Activations({ONLY_UNIT: self.x_ND})


class OneUnit:
    """The only unit of one process, with its bank and its optimizer.

    Args:
        cfg: The training's configuration; `num_latents` and `k` override it.
        x_ND: The activations to train on, on the training device.
        num_latents: M.
        k: Active latents per token.
        kernels: The kernels that compute it.
        dead: Share of the latents that are dead and stay dead.
    """

    def __init__(
        self, cfg: TrainConfig, x_ND: Tensor, num_latents: int, k: int, kernels: Kernels, dead: float = 0.0
    ) -> None:
        cfg = replace(cfg, sae=replace(cfg.sae, num_latents=num_latents, k=k))
        rows_ND = x_ND.float()
        mean_D = rows_ND.mean(0)
        variance = float((rows_ND - mean_D).square().sum() / len(rows_ND))
        limit = cfg.max_norm_multiple * float(rows_ND.norm(dim=1).median()) if cfg.max_norm_multiple > 0 else None
        known = Calibration(mean_D, variance, limit)
        sae = Sae(
            **cfg.sae.sizes(x_ND.shape[1], num_latents),
            max_norm=limit,
            generator=torch.Generator().manual_seed(0),
            device=x_ND.device,
        )
        sae.chosen_kernels = kernels
        sae.prefixes = cfg.sae.resolve_prefixes(num_latents)
        sae.b_dec.data.copy_(mean_D)
        sae.fit_selection_(rows_ND[:SAMPLE], known.rms)
        self.source = Given(x_ND)
        self.sae = sae
        self.bank = bank_of_one(cfg, sae, known, dead_threshold=NEVER)
        number = int(dead * num_latents)
        sae.b_enc.data[:number] = -1e3
        self.bank.since_fired_F[:number] = NEVER
        self.bank.count_dead()

    def passes(self) -> None:
        """Run the forward and backward pass over the activations, and drop the gradients."""
        self.bank.begin_(len(self.source.x_ND))
        self.bank.units[ONLY_UNIT].run_(self.source.x_ND)
        self.bank.placement.skip()

    def step(self) -> None:
        """Take an optimizer step as the training loop does.

        Raises:
            RuntimeError: If the step has NaN or Inf.
        """
        message = train_step(self.bank, self.source, self.source.read(0), lr_scale=1.0)
        if message.faults:
            raise RuntimeError(f"the step was skipped because of NaN or Inf: {message.faults}")

    def held(self) -> list[Tensor]:
        """Return weights and optimizer state."""
        weights, state = self.bank.placement.whole(ONLY_UNIT) or ({}, {})
        return [*weights.values(), *state.values()]
