"""What an evaluation found, and its file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from saekit.evaluation.estimate import Estimate
from saekit.layout import EVAL_FORMAT
from saekit.report.inspect_measure import Density


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
