"""BatchTopK: as many latents as a token needs, k of them on average.

Bussmann et al. 2024 (arXiv 2412.06410) take the k·N largest values of a training batch, and a threshold only after
training. Here it is a threshold from the start, which stands still during an optimizer step: otherwise the split of a
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
"""A value is near the threshold if it is above it by at most this factor."""
GAIN = 0.5
"""The share of the way to the estimated threshold that a step goes.

Measured on the demo's language model, all six layers, 147 steps of 2048 tokens. While values grow, mean L0 lags
behind, by less the higher the gain and the longer the run: at k 32 it was 1.4 to 3.0% below k over the whole run and
0.2 to 1.1% in its second half, at k 8 1.2 to 1.4% and up to 0.4%. At a gain of 0.75 one layer's L0 swung up to twice k
at k 8. With a fixed exponent in place of GAIN / s that suits k 32, it swung by half of k there.
Over 293 steps at k 32 it was 0.8 to 1.7% below k.
"""
LARGEST_MOVE = 0.3
"""The largest change of a threshold's logarithm in a step."""
STEEPNESS = (1.0, 30.0)
"""The steepness is taken to be between these, however few values it is counted from."""
SMALLEST_THRESHOLD = 1e-3
"""The smallest threshold, in units of the activations' root mean square: multiplying cannot leave zero."""


class BatchTopK(TopK):
    """Of a token's 4k largest latents those above the threshold θ are active.

        z_m = a_m if a_m > θ else 0        a = TopK(ReLU(W_enc (x − b_dec) + b_enc)) with 4k of M latents

    Args:
        k: The mean number of active latents.
        num_latents: M.
        threshold: θ, in the activations' unit.

    Raises:
        ValueError: If the sizes cannot be, or the threshold is negative or no number.
    """

    name: ClassVar[str] = "batchtopk"
    multi_topk: ClassVar[bool] = False
    lr_factor: ClassVar[float] = 2.0
    """Measured in docs/quality.md."""
    num_sums: ClassVar[int] = 1
    threshold: Tensor
    """θ, float64 and 0-dimensional, on the SAE's device."""

    def __init__(self, k: int, num_latents: int, threshold: float = 0.0) -> None:
        super().__init__(k, num_latents)
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        self.threshold = torch.tensor(threshold, dtype=torch.float64)

    @property
    def max_active(self) -> int:
        """K: 4k, or all latents where there are fewer."""
        return min(CODE_WIDTH * self.k, self.num_latents)

    def before_fit(self) -> Selection:
        """Return the k largest."""
        return TopK(self.k, self.num_latents)

    @torch.no_grad()
    def fit_(self, scores_RM: Tensor, rms: float) -> None:
        """Set the threshold so that the sample has k latents on average."""
        acts_RK = F.relu(scores_RM).topk(self.max_active, dim=1).values
        wanted = self.k * len(acts_RK)  # values that should be above the threshold, which is the largest of the others
        others = acts_RK.flatten().sort(descending=True).values[wanted:]
        self.threshold.fill_(max(float(others[0]) if len(others) else 0.0, SMALLEST_THRESHOLD * rms))

    def sums(self, acts: Tensor) -> Tensor:
        """Count the values of each token's code that are near the threshold."""
        return ((acts > self.threshold) & (acts <= NEAR_FACTOR * self.threshold)).sum(-1, keepdim=True)

    @torch.no_grad()
    def move_(self, firings: Tensor, tokens: Tensor, sums: Tensor, rms: Tensor) -> None:
        """Move the threshold towards the one that gives k latents on average.

            θ ← θ · (L0 / k)^(GAIN / s)        L0 = firings / tokens        s = near / (firings · ln NEAR_FACTOR)

        A share of Newton's step: L0 falls about as a power of θ near θ, and s is its exponent, counted in the same
        step. It differs between layers, sizes and times by a factor of several; a fixed rate that follows one swings
        in another. A step without a token moves nothing.
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
            raise ValueError("there is no number of at least 0 as 'threshold', which BatchTopK needs")
        return cls(k, num_latents, threshold)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> list[tuple[str, float, str]]:
        """Return the threshold."""
        threshold = config.get("threshold")
        if not is_length(threshold):
            return []
        return [("threshold", float(threshold), "of BatchTopK: smaller values are zero")]

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`jumprelu` with θ for every latent: the same unless a token has more than 4k latents above θ."""
        thresholds_M = torch.full((self.num_latents,), float(self.threshold), dtype=torch.float64)
        return {"architecture": "jumprelu"}, {"threshold": thresholds_M}

    def __repr__(self) -> str:
        """With its threshold, where that is a number."""
        return self.name if self.threshold.is_meta else f"{self.name}, threshold={float(self.threshold):.6g}"
