"""A unit is one coder in training. The loop, the planner and the benchmarks all run this definition of its step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit.config import TrainConfig
from saekit.sae import Sae, sae_losses
from saekit.training.frame import Frame
from saekit.training.statistics import observe_, without_excluded


@dataclass(frozen=True)
class Calibration:
    """Measurements of a site on the counted tokens of the first global batch; fixed for the run."""

    mean_D: Tensor
    """`[D_out]`, float32: the mean of the target in the unit's frame. It is the initial `b_dec`."""
    variance: float
    """σ², the total variance (trace of the covariance) of the target in the unit's frame. The loss is divided by it."""
    max_norm: float | None = None
    """Tokens whose input has a larger norm are excluded; None excludes none."""
    max_norm_out: float | None = None
    """The same for a transcoder's target."""
    frame: Frame | None = None
    """The frame of a transcoder or a crosscoder; None for an SAE, which sees activations as they are."""

    def numbers(self) -> dict[str, Any]:
        """Return the fields that must be equal to the bit on all ranks, as arguments."""
        return {
            "variance": self.variance,
            "max_norm": self.max_norm,
            "max_norm_out": self.max_norm_out,
            "frame": self.frame,
        }

    @property
    def rms(self) -> float:
        """Return the root mean square of the centred input, for an SAE `σ / √D`. The biases have this unit."""
        return float((self.variance / len(self.mean_D)) ** 0.5) if self.frame is None else self.frame.rms


class Scales(NamedTuple):
    """Factors on a unit's losses in one step of N tokens: scalars that are fixed before its backward passes."""

    main: Tensor
    """Factor on the main loss: `1 / (N σ²)`, float64."""
    auxk: Tensor
    """Factor on AuxK's loss: `main`, or `1 / (N e)` with the mean squared error e of the last step, as float32."""
    revive: Tensor
    """Factor on the loss that revives dead latents: `1 / (N r)` with `Calibration.rms` r, float64."""


@dataclass
class Unit:
    """One coder in training.

    Its step is a fixed graph: `run_` for every chunk of tokens, then the optimizer's step. The host reads no number
    from it, no shape depends on data, and no Python number changes from step to step. What changes (scales, dead
    latents, counts) is in tensors that `Bank` fills for all units at once. Two things are outside of the fixed graph:
    AuxK, which gathers the dead latents (`aux_latents`), and the last batch of a run, which may be shorter than the
    others.
    """

    name: str
    """The name of its site, and of the folder that it is saved in."""
    sae: Sae
    cfg: TrainConfig
    backward: Callable[[Tensor], None]
    """Adds the gradient of a loss to the unit's gradients."""
    centre_D: Tensor
    """`[D_out]`: the mean of the target in the first batch."""
    scales: Scales
    sums_7: Tensor
    """The unit's row of the step's `Tally`, float64."""
    mean_D: Tensor
    """The unit's part of that tally's means, float64 `[D_out]`."""
    selection_sums: Tensor
    """int64 `[S]`: sums over the step by which the selection is moved (`SaeOutput.sums`)."""
    fired_M: Tensor
    """int64 `[M]`: tokens of the step on which each latent fired."""
    frame: Frame | None = None
    """The frame of a transcoder or a crosscoder; None for an SAE."""
    dead_M: Tensor | None = None
    """bool `[M]`: latents that were dead when the step began; None if dead latents are not revived."""
    may_sync: bool = False
    """Whether the host may read whether any norm is too large. On a CPU this is free and usually saves the masking."""
    aux_latents: Tensor | None = None
    """int64 `[dead]`: the numbers of the dead latents, for AuxK; None without AuxK."""

    def run_(self, chunk_NW: Tensor, counted_N1: Tensor | None = None) -> None:
        """Run the forward and backward pass over a chunk of tokens, and add to gradients, sums and counters.

        No tensor of the passes outlives the call.

        Args:
            chunk_NW: `[N, W]`, the input, followed by the target for a transcoder, in any float type.
            counted_N1: bool `[N, 1]`, False for excluded tokens; None if there are none.
        """
        tokens = None if counted_N1 is None else counted_N1.sum()
        x_ND, y_ND = (chunk_NW.float(), None) if self.frame is None else self.frame.split(chunk_NW.float())
        x_ND, counted_N1 = without_excluded(self.sae, x_ND, counted_N1, y_ND=y_ND, may_sync=self.may_sync)
        if self.frame is not None:
            x_ND = self.frame(x_ND)
        if y_ND is None:
            y_ND = x_ND
        elif counted_N1 is not None:
            y_ND = y_ND * counted_N1
        out = self.sae(x_ND, self.dead_M, aux=self.aux_latents).masked(counted_N1)
        losses = sae_losses(
            y_ND,
            out,
            scale=self.scales.main,
            auxk_alpha=self.cfg.auxk_alpha,
            num_dead=0 if self.aux_latents is None else len(self.aux_latents),
            auxk_scale=self.scales.auxk,
            revive_alpha=self.cfg.revive_alpha,
            revive_scale=self.scales.revive,
            tokens=tokens,
        )
        self.backward(losses.total)
        self.fired_M.scatter_add_(0, out.indices.flatten(), out.fired.flatten().long())
        if out.sums is not None:
            self.selection_sums += out.sums.flatten(0, -2).sum(0)
        observe_(self.sums_7, self.mean_D, y_ND, out, losses, self.scales.main.to(y_ND.dtype), self.centre_D)


def dead_numbers(dead_M: Tensor, count: int) -> Tensor:
    """Return the numbers of the dead latents, int64 `[count]`. The known count saves a wait for the GPU."""
    return torch.nonzero_static(dead_M, size=count).squeeze(1)
