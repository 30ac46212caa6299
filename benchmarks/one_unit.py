"""One unit on given activations, trained by the loop's own `train_step`: what is timed is what is trained."""

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
"""Tokens without firing after which a latent is dead: none becomes so by itself."""
SAMPLE = 512
"""Tokens that a selection is fitted to."""


class Given(Source):
    """The same activations in every step.

    Args:
        x_ND: `[N, D]`, in the type in which a language model would give them.
    """

    name = data_name = "given"

    def __init__(self, x_ND: Tensor) -> None:
        self.x_ND = x_ND

    def begin(self, *args: Any) -> None:
        """Nothing is left to the run."""

    def read(self, step: int) -> list[None]:
        """One micro-batch, which needs no telling."""
        return [None]

    def checksum(self, step: int) -> str:
        """All steps are the same."""
        return ""

    def count(self, batch: None) -> int:
        """N."""
        return len(self.x_ND)

    def __call__(self, batch: None) -> Activations:
        """`[N, D]`."""
        return Activations({ONLY_UNIT: self.x_ND})


class OneUnit:
    """A unit alone in one process, with its bank and its optimizer.

    Args:
        cfg: How to train; k and the number of latents are those given here.
        x_ND: What on, on the device where it is to be trained.
        num_latents: M.
        k: Active latents per token.
        kernels: What it is computed with.
        dead: Share of the latents that are dead, and stay so.
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
        """Forward and backward pass over the activations; the gradients are dropped."""
        self.bank.begin_(len(self.source.x_ND))
        self.bank.units[ONLY_UNIT].run_(self.source.x_ND)
        self.bank.placement.skip()

    def step(self) -> None:
        """An optimizer step, as the loop takes it."""
        message = train_step(self.bank, self.source, self.source.read(0), lr_scale=1.0)
        if message.faults:
            raise RuntimeError(f"the step does not count: {message.faults}")

    def held(self) -> list[Tensor]:
        """Weights and optimizer state."""
        weights, state = self.bank.placement.whole(ONLY_UNIT) or ({}, {})
        return [*weights.values(), *state.values()]
