"""The results of an evaluation: estimates from sums over sequences, and the file they go to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from saekit.analysis.measure import Density
from saekit.analysis.student import standard_errors
from saekit.runs.layout import EVAL_FORMAT
from saekit.units import plural

FEW_SEQUENCES = 50
"""Sequences below which an evaluation warns: with fewer, the spread over sequences is itself hardly known."""


def few_sequences(sequences: int, ctx_len: int, option: str = "--max-tokens") -> str | None:
    """Return a warning if there are too few sequences to tell how they differ; None if there are enough.

    Args:
        sequences: How many are evaluated.
        ctx_len: Tokens in each.
        option: What sets how many they are.
    """
    if sequences >= FEW_SEQUENCES:
        return None
    return (
        f"only {plural(sequences, 'sequence')} evaluated: with fewer than {FEW_SEQUENCES} the intervals are rough; "
        f"evaluate {FEW_SEQUENCES * ctx_len:,} tokens or more ({option}), on more text if there are not as many"
    )


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
    6.4): `Σ (aₛ − R bₛ)² · S / (S − 1) / (Σ bₛ)²`. The interval is that of Student's t with S − 1 degrees of freedom.

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
    half = standard_errors(count - 1) * math.sqrt(variance)
    return Estimate(value, value - half, value + half)


@dataclass(frozen=True)
class Reconstruction:
    """The quality of a reconstruction, over all counted tokens. An SAE's target is its input.

    Of a crosscoder's hookpoints each counts as much: all are scaled to one variance, so FVU and explained variance are
    the means of theirs, and so is the cosine.
    """

    fvu: Estimate
    """Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖², with the mean x̄ over the same tokens."""
    explained_variance: Estimate
    """One minus the FVU without the mean error in the numerator, which a constant could correct."""
    cosine: Estimate
    """Mean over tokens of the cosine of x and x̂."""
    l0: Estimate
    """Mean number of latents above zero per token."""
    tokens: int
    """That count: not excluded, and no longer than the SAE's `max_norm` (and a transcoder's `max_norm_out`)."""
    dead: int
    """Latents that fired on none of the tokens."""
    num_latents: int
    density: Density
    """On which share of the tokens latents fire."""


@dataclass(frozen=True)
class Grafted:
    """The language model's answers when the activations of one layer, or of all layers, are replaced."""

    ce: Estimate
    """Cross-entropy with the true tokens, nats per scored token, with the reconstruction spliced in."""
    ce_mean_ablated: Estimate
    """The same with the layer's mean activation in place of every token's."""
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
class PartResult:
    """A crosscoder's reconstruction of one of its hookpoints; see `Reconstruction`."""

    hookpoint: str
    fvu: Estimate
    explained_variance: Estimate
    cosine: Estimate


@dataclass(frozen=True)
class SkipResult:
    """The prediction of a skip transcoder without its latents, `W_skip x + b_dec`."""

    fvu: Estimate
    explained_variance: Estimate
    cosine: Estimate
    grafted: Grafted | None
    """With that spliced in."""


@dataclass(frozen=True)
class LayerResult:
    """One SAE, transcoder or crosscoder."""

    hookpoint: str
    """That it is named after; "crosscoder" for one of several."""
    reconstruction: Reconstruction
    grafted: Grafted | None
    """None where the model has no head."""
    kind: str = "SAE"
    """"SAE", "transcoder" or "crosscoder"."""
    reads: tuple[str, ...] = ()
    """Names of hookpoints."""
    writes: tuple[str, ...] = ()
    """Names of the hookpoints that it predicts, which is where it is spliced in."""
    parts: tuple[PartResult, ...] = ()
    """Of a crosscoder, each of its hookpoints."""
    skip: SkipResult | None = None
    """Of a transcoder with a skip connection."""
    other: Grafted | None = None
    """Of a crosscoder of two models: the second's answers with its part of the reconstruction; `grafted` are those of
    the first with the other part."""


@dataclass(frozen=True)
class OtherResult:
    """The second of two models; None where it has no head."""

    model: str
    """Its name."""
    ce_clean: Estimate | None
    together: Grafted | None


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint, evaluated."""

    layers: tuple[LayerResult, ...]
    together: Grafted | None
    """All spliced at once, each reading what the one before it left; a crosscoder reads the clean model."""
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
    misplaced: tuple[str, ...] = ()
    """A sentence for each coder that was trained on another model or elsewhere in this one, where its files say so."""
    other: OtherResult | None = None
    """Of two models the second."""

    def warnings(self) -> list[str]:
        """Return warnings about results that look wrong, are of the wrong thing, or rest on too little."""
        few = few_sequences(self.sequences, self.ctx_len)
        worse = [
            f"{layer.hookpoint}: FVU {layer.reconstruction.fvu.value:.2f}, worse than the mean: this {layer.kind} was "
            "hardly trained on this layer of this model"
            for layer in self.layers
            if layer.reconstruction.fvu.value > 1
        ]
        return [*self.misplaced, *([few] if few else []), *worse]

    def to_json(self) -> dict[str, Any]:
        """Plain values; an estimate is `{"value", "low", "high"}`. `warnings` has what is not a number."""
        values = asdict(self)
        del values["misplaced"]
        if self.other is None:
            for each in (values, *values["layers"]):
                del each["other"]
        return {"format": EVAL_FORMAT, **values}
