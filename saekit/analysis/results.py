"""What an evaluation found, and its file."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from saekit.analysis.measure import Density
from saekit.runs.layout import EVAL_FORMAT


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval over sequences."""

    value: float
    low: float | None
    """None with a single sequence, which tells nothing of how others differ."""
    high: float | None

    def complement(self) -> Estimate:
        """One minus it."""
        low, high = (None if end is None else 1 - end for end in (self.high, self.low))
        return Estimate(1 - self.value, low, high)


def ratio(numerator_S: Tensor, denominator_S: Tensor) -> Estimate:
    """Σ numerator / Σ denominator over sequences, with an interval by linearisation.

    Tokens of one sequence are alike, so it is sequences that count as drawn independently, and their sums over tokens
    that vary. The variance is that of the classical ratio estimator (Cochran 1977, "Sampling Techniques", section
    6.4): `Σ (aₛ − R bₛ)² · S / (S − 1) / (Σ bₛ)²`.

    Args:
        numerator_S: `[S]`, a sum over each sequence's tokens.
        denominator_S: `[S]`: what it is divided by; a count of tokens, say.

    Returns:
        NaN with no interval where the denominators sum to zero.
    """
    a_S, b_S = numerator_S.double(), denominator_S.double()
    total, count = float(b_S.sum()), len(b_S)
    if total == 0:
        return Estimate(math.nan, None, None)
    value = float(a_S.sum()) / total
    if count < 2:
        return Estimate(value, None, None)
    variance = float((a_S - value * b_S).square().sum()) * count / (count - 1) / total**2
    half = Z * math.sqrt(variance)
    return Estimate(value, value - half, value + half)


@dataclass(frozen=True)
class Reconstruction:
    """How well an SAE reconstructs its layer's activations, over all tokens that it is for."""

    fvu: Estimate
    """Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖², with the mean x̄ over the same tokens."""
    explained_variance: Estimate
    """One minus the same with the mean error taken out of the numerator: what a constant could mend is not counted."""
    cosine: Estimate
    """Mean over tokens of the cosine of x and x̂."""
    l0: Estimate
    """Mean number of latents above zero per token."""
    tokens: int
    """That count: not excluded, and no longer than the SAE's `max_norm`."""
    dead: int
    """Latents that fired on none of the tokens."""
    num_latents: int
    density: Density
    """On which share of the tokens latents fire."""


@dataclass(frozen=True)
class Grafted:
    """What the language model says with something in the place of one layer's activations, or of all layers'."""

    ce: Estimate
    """Cross-entropy with the true tokens, nats per scored token, with the reconstruction spliced in."""
    ce_mean_ablated: Estimate
    """The same with the layer's mean activation in the place of every token's."""
    ce_zero_ablated: Estimate
    """The same with zeros."""
    ce_recovered: Estimate
    """(CE zero-ablated − CE spliced) / (CE zero-ablated − CE clean): 1 is perfect, 0 no better than zeros."""
    ce_recovered_from_mean: Estimate
    """The same against the mean-ablated model."""
    kl: Estimate
    """KL(clean ‖ spliced), nats per scored token."""
    top1: Estimate
    """Share of scored tokens for which the most likely prediction stays the same."""


@dataclass(frozen=True)
class LayerResult:
    """One SAE."""

    hookpoint: str
    reconstruction: Reconstruction
    grafted: Grafted | None
    """None where the model has no head."""


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint, evaluated."""

    layers: tuple[LayerResult, ...]
    together: Grafted | None
    """All layers spliced at once, each reading what the one before it left."""
    ce_clean: Estimate | None
    """Of the language model as it is."""
    objective: str
    """"next token", "masked token", or why there is none."""
    sequences: int
    ctx_len: int
    tokens: int
    """That are not excluded."""
    scored: int
    """Predictions that were scored."""

    def warnings(self) -> list[str]:
        """What looks wrong."""
        return [
            f"{layer.hookpoint}: FVU {layer.reconstruction.fvu.value:.2f}, worse than the mean: this SAE was hardly "
            "trained on this layer of this model"
            for layer in self.layers
            if layer.reconstruction.fvu.value > 1
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values; an estimate is `{"value", "low", "high"}`."""
        return {"format": EVAL_FORMAT, **asdict(self)}


Z = 1.959963984540054
"""Standard errors on each side of a 95% interval."""
