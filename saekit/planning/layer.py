"""One layer's training as the loop does it: what plans meter on the meta device, and calibration times for real."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.sae import Sae, sae_losses
from saekit.sae.kernels import Kernels
from saekit.training.counters import LayerCounters
from saekit.training.optimizers import make_optimizer
from saekit.training.statistics import LayerWindow, covered


class Layer:
    """An SAE with random weights, its optimiser, counters and statistics.

    On the meta device 8-bit Adam, which does not run there, is replaced by Adam.

    Args:
        cfg: The run's.
        d_in: D.
        num_latents: M.
        kernels: What it is computed with.
        device: Where.
        alone: As `saekit.placement.local.LocalBank.alone`.
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
        self.cfg, self.device = cfg, device
        with device:
            limit = float("inf") if cfg.max_norm_multiple > 0 else None  # as if there were some to leave out
            self.sae = Sae(**cfg.sae.sizes(d_in, num_latents), max_norm=limit).train()
        self.sae.chosen_kernels = kernels
        self.sae.prefixes = cfg.sae.resolve_prefixes(num_latents)
        on_meta = device.type == "meta"
        stand_in = on_meta and cfg.optimizer == "adam8bit"
        self.optimizer = make_optimizer(replace(cfg, optimizer="adam") if stand_in else cfg, self.sae)
        for each in self.optimizer.optimizers if on_meta else ():
            for group in each.param_groups:
                group |= {"fused": False} if group.get("fused") else {}  # no such kernel there
        if alone and not stand_in:
            self.optimizer.defer_gradients()
        self.counters = LayerCounters.fresh(num_latents, device)
        self.window = LayerWindow.empty(d_in, device, self.sae.selection.num_sums)

    def passes(self, chunk_ND: Tensor, dead: Tensor | None = None) -> None:
        """Forward and backward pass, as in `SaeTrainer`."""
        num_dead = 0 if dead is None else len(dead)
        x_ND, covered_N1 = covered(self.sae, chunk_ND.float())
        is_dead = self.counters.is_dead(0) if dead is not None and self.cfg.revive_alpha > 0 else None
        out = self.sae(x_ND, is_dead, aux=dead if self.cfg.auxk_alpha > 0 else None).only(covered_N1)
        losses = sae_losses(
            x_ND, out, scale=1.0, auxk_alpha=self.cfg.auxk_alpha, num_dead=num_dead, revive_alpha=self.cfg.revive_alpha
        )
        losses.total.backward()
        self.counters.observe(out.fired, out.indices)
        self.window.observe(x_ND, out, losses, 1.0, self.sae.b_dec.detach())

    def update(self) -> None:
        """The optimiser's step; the gradients stay."""
        self.optimizer.step(1.0)
