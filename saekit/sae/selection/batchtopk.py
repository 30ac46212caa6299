"""BatchTopK: a number of latents that varies between tokens, k on average.

Bussmann et al. 2024 (arXiv 2412.06410) take the k·N largest values of a training batch, and a threshold only after
training. saekit uses a threshold from the start and keeps it fixed during an optimizer step. Otherwise the split of a
batch into chunks, micro-batches or ranks would change the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saekit.sae.entries import is_length
from saekit.sae.selection.base import Selection
from saekit.sae.selection.topk import TopK

CODE_WIDTH = 4
"""A token has at most `CODE_WIDTH` · k active latents."""
NEAR_FACTOR = 1.1
"""A value is near the threshold if it exceeds it by at most this factor."""
GAIN = 0.5
"""How far a step moves the threshold towards the estimated one: 1 moves it all the way.

Measured on the demo's language model, all six layers, 147 steps of 2048 tokens. While values grow, mean L0 lags behind
k. The lag shrinks with a higher gain and a longer run. At k = 32, L0 was 1.4 to 3.0% below k over the whole run and 0.2
to 1.1% below in its second half; at k = 8, 1.2 to 1.4% and up to 0.4%. Over 293 steps at k = 32, it was 0.8 to 1.7%
below. With a gain of 0.75, one layer's L0 swung up to twice k at k = 8. With a fixed exponent in place of GAIN / s,
tuned to k = 32, it swung by half of k there.
"""
LARGEST_MOVE = 0.3
"""The largest change of a threshold's logarithm in a step."""
STEEPNESS = (1.0, 30.0)
"""Bounds of the steepness, since an estimate from few values can be far off."""
SMALLEST_THRESHOLD = 1e-3
"""The smallest threshold, in units of the activations' root mean square: multiplying cannot leave zero."""


class BatchTopK(TopK):
    """Makes those of a token's 4k largest latents active that exceed the threshold θ.

        z_m = a_m if a_m > θ else 0        a = TopK(ReLU(W_enc (x − b_dec) + b_enc)) with 4k of M latents

    Args:
        k: The mean number of active latents.
        num_latents: M.
        threshold: θ, in the activations' unit.

    Raises:
        ValueError: If k exceeds M, or if the threshold is negative or NaN.
    """

    name: ClassVar[str] = "batchtopk"
    multi_topk: ClassVar[bool] = False
    lr_factor: ClassVar[float] = 2.0
    """Measured in docs/quality.md."""
    num_sums: ClassVar[int] = 1
    threshold: Tensor
    """θ: float64, 0-dimensional, on the SAE's device."""

    def __init__(self, k: int, num_latents: int, threshold: float = 0.0) -> None:
        super().__init__(k, num_latents)
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        self.threshold = torch.tensor(threshold, dtype=torch.float64)

    @property
    def max_active(self) -> int:
        """Return K: 4k, or M if that is smaller."""
        return min(CODE_WIDTH * self.k, self.num_latents)

    def before_fit(self) -> Selection:
        """Return TopK with the same k."""
        return TopK(self.k, self.num_latents)

    @torch.no_grad()
    def fit_(self, scores_RM: Tensor, rms: float) -> None:
        """Set the threshold so that the sample's tokens have k active latents on average."""
        acts_RK = F.relu(scores_RM).topk(self.max_active, dim=1).values
        wanted = self.k * len(acts_RK)  # this many values should exceed the threshold: the largest of the others
        others = acts_RK.flatten().sort(descending=True).values[wanted:]
        self.threshold.fill_(max(float(others[0]) if len(others) else 0.0, SMALLEST_THRESHOLD * rms))

    def sums(self, acts: Tensor) -> Tensor:
        """Count the values of each token's code that are just above the threshold (`NEAR_FACTOR`)."""
        return ((acts > self.threshold) & (acts <= NEAR_FACTOR * self.threshold)).sum(-1, keepdim=True)

    @torch.no_grad()
    def move_(self, firings: Tensor, tokens: Tensor, sums: Tensor, rms: Tensor) -> None:
        """Move the threshold towards the one that gives k active latents on average.

            θ ← θ · (L0 / k)^(GAIN / s)        L0 = firings / tokens        s = near / (firings · ln NEAR_FACTOR)

        This is a damped Newton step: near θ, L0 falls roughly as a power of θ, and s estimates the exponent from the
        same step's counts. The exponent differs several-fold between layers, sizes and times, so a fixed rate that is
        fast enough for one makes another oscillate. A step without tokens changes nothing.
        """
        fired = firings.clamp_min(1).double()
        steepness = (sums[..., 0].double() / (fired * math.log(NEAR_FACTOR))).clamp(*STEEPNESS)
        distance = (fired / (self.k * tokens.clamp_min(1))).log()
        moved = self.threshold * (GAIN / steepness * distance).clamp(-LARGEST_MOVE, LARGEST_MOVE).exp()
        self.threshold.copy_(torch.where(tokens > 0, torch.clamp_min(moved, SMALLEST_THRESHOLD * rms), self.threshold))

    def state(self) -> dict[str, Tensor]:
        """Return the threshold."""
        return {"threshold": self.threshold}

    def to_config(self) -> dict[str, Any]:
        """Return the threshold as a plain number."""
        return {"threshold": float(self.threshold)}

    @classmethod
    def from_config(cls, k: int, num_latents: int, config: Mapping[str, Any]) -> Selection:
        """Read the threshold."""
        threshold = config.get("threshold")
        if not is_length(threshold):
            raise ValueError("BatchTopK needs a number 'threshold' of at least 0")
        return cls(k, num_latents, threshold)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> list[tuple[str, float, str]]:
        """Return the threshold."""
        threshold = config.get("threshold")
        if not is_length(threshold):
            return []
        return [("threshold", float(threshold), "of BatchTopK: smaller values are zero")]

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return `jumprelu` with θ for every latent: the same unless a token has more than 4k latents above θ."""
        thresholds_M = torch.full((self.num_latents,), float(self.threshold), dtype=torch.float64)
        return {"architecture": "jumprelu"}, {"threshold": thresholds_M}

    def __repr__(self) -> str:
        """Return the name and the threshold, for `print(sae)`."""
        return self.name if self.threshold.is_meta else f"{self.name}, threshold={float(self.threshold):.6g}"
