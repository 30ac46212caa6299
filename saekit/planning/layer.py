"""One unit's training as the loop does it: what plans meter on the meta device, and calibration times for real."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.placement import Single
from saekit.sae import Sae
from saekit.sae.kernels import Kernels
from saekit.training.bank import Bank
from saekit.training.optimizers import make_optimizer
from saekit.training.unit import Calibration

NAME = "layers.0"


class Layer:
    """A bank of one unit with random weights, in one process.

    On the meta device 8-bit Adam, which does not run there, is replaced by Adam.

    Args:
        cfg: The run's.
        d_in: D.
        num_latents: M.
        kernels: What it is computed with.
        device: Where.
        alone: As `saekit.placement.questions.Questions.alone`.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        d_in: int,
        num_latents: int,
        kernels: Kernels,
        device: torch.device,
        alone: bool = False,
    ) -> None:
        on_meta = device.type == "meta"
        stand_in = on_meta and cfg.optimizer == "adam8bit"
        with device:
            limit = float("inf") if cfg.max_norm_multiple > 0 else None  # as if there were some to exclude
            sae = Sae(**cfg.sae.sizes(d_in, num_latents), max_norm=limit)
            known = {NAME: Calibration(torch.zeros(d_in), 1.0, limit)}
        sae.chosen_kernels = kernels
        sae.prefixes = cfg.sae.resolve_prefixes(num_latents)
        optimizer = make_optimizer(replace(cfg, optimizer="adam") if stand_in else cfg, sae)
        for each in optimizer.optimizers if on_meta else ():
            for group in each.param_groups:
                group |= {"fused": False} if group.get("fused") else {}  # no such kernel there
        placement = Single(device)
        placement.alone = alone and not stand_in
        placement.place([NAME], lambda _: sae, lambda _: optimizer)
        self.sae, self.optimizer = sae, optimizer
        self.bank = Bank(cfg, placement, {NAME: d_in}, {NAME: 1}, known)
        self.unit = self.bank.units[NAME]

    def passes(self, chunk_ND: Tensor, dead: Tensor | None = None) -> None:
        """Forward and backward pass over a chunk of tokens.

        Args:
            chunk_ND: `[N, D]`.
            dead: Numbers of the dead latents, for AuxK.
        """
        self.unit.aux_latents = dead if self.bank.cfg.auxk_alpha > 0 else None
        self.unit.run_(chunk_ND)

    def update(self) -> None:
        """The optimizer's step; the gradients stay."""
        self.optimizer.step(1.0)

