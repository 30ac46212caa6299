"""One unit in training: plans meter it on the meta device, and calibration times it on real devices."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.placement import LayerOptimizer
from saekit.placement.costs import Size
from saekit.sae import Sae
from saekit.sae.kernels import Kernels
from saekit.training.bank import ONLY_UNIT, bank_of_one
from saekit.training.frame import crosscoder_frame, transcoder_frame
from saekit.training.optimizers import make_optimizer
from saekit.training.unit import Calibration


class Layer:
    """A unit with random weights and its optimizer.

    On the meta device, Adam stands in for 8-bit Adam, which does not run there.

    Args:
        cfg: The training's configuration.
        size: The size of the coder.
        kernels: The kernels that compute it.
        device: The device that it is on.
        owns_gradient: Whether gradients may be deferred to the step, see `Placement.owns_gradient`.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        size: Size,
        kernels: Kernels,
        device: torch.device,
        owns_gradient: bool = False,
    ) -> None:
        self.on_meta = device.type == "meta"
        stand_in = self.on_meta and cfg.optimizer == "adam8bit"
        self.cfg = replace(cfg, optimizer="adam") if stand_in else cfg
        with device:
            limit = float("inf") if cfg.max_norm_multiple > 0 else None  # runs the code that excludes tokens
            d_out = size.d_out if size.transcodes else None
            sae = Sae(**cfg.sae.sizes(size.d_in, size.num_latents, d_out), max_norm=limit)
            frame = transcoder_frame(size.d_in, torch.zeros(size.d_in), 1.0, 1.0) if size.transcodes else None
            frame = crosscoder_frame([size.d_in], [1.0]) if size.joins else frame
            known = Calibration(torch.zeros(size.d_out), float(size.d_out), limit, frame=frame)
            sae.max_norm_out = limit if size.transcodes else None
        sae.chosen_kernels = kernels
        sae.prefixes = cfg.sae.resolve_prefixes(size.num_latents)
        self.bank = bank_of_one(
            cfg, sae, known, owns_gradient=owns_gradient and not stand_in, optimizer=self._optimizer
        )
        self.unit = self.bank.units[ONLY_UNIT]
        self.sae = sae

    def _optimizer(self, sae: Sae) -> LayerOptimizer:
        self.optimizer = make_optimizer(self.cfg, sae)
        for each in self.optimizer.optimizers if self.on_meta else ():
            for group in each.param_groups:
                group |= {"fused": False} if group.get("fused") else {}  # the meta device has no fused kernel
        return self.optimizer

    def passes(self, chunk_NW: Tensor, dead: Tensor | None = None) -> None:
        """Run the forward and backward pass over a chunk of tokens.

        Args:
            chunk_NW: `[N, W]`, the input, followed by the target for a transcoder.
            dead: int64 `[dead]`, the numbers of the dead latents, for AuxK.
        """
        self.unit.aux_latents = dead if self.cfg.auxk_alpha > 0 else None
        self.unit.run_(chunk_NW)

    def update(self) -> None:
        """Take the optimizer's step and keep the gradients."""
        self.optimizer.prepare(1.0)
        self.optimizer.step()
