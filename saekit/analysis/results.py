"""The results of an evaluation, estimated from sums over sequences, and their JSON form."""

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
"""An evaluation warns if it has fewer sequences: their spread, and so the intervals, are then poorly known."""


def few_sequences(sequences: int, ctx_len: int, option: str = "--max-tokens") -> str | None:
    """Return a warning if there are too few sequences for good intervals, or None.

    Args:
        sequences: The number of sequences.
        ctx_len: Tokens per sequence.
        option: The option that sets the number of tokens.
    """
    if sequences >= FEW_SEQUENCES:
        return None
    return (
        f"only {plural(sequences, 'sequence')} evaluated: with fewer than {FEW_SEQUENCES} the intervals are rough. "
        f"Evaluate {FEW_SEQUENCES * ctx_len:,} tokens or more ({option}), with more text if necessary"
    )


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% confidence interval over sequences."""

    value: float
    low: float | None
    """None with a single sequence, for which there is no spread."""
    high: float | None

    def complement(self) -> Estimate:
        """Return one minus this estimate."""
        low, high = (None if end is None else 1 - end for end in (self.high, self.low))
        return Estimate(1 - self.value, low, high)


def ratio(numerator_S: Tensor, denominator_S: Tensor) -> Estimate:
    """Estimate Σ numerator / Σ denominator over sequences, with an interval by linearization.

    Tokens of one sequence are correlated, so sequences, not tokens, count as independent samples. The variance is that
    of the classical ratio estimator (Cochran 1977, "Sampling Techniques", section 6.4):
    `Σ (aₛ − R bₛ)² · S / (S − 1) / (Σ bₛ)²`. The interval uses Student's t with S − 1 degrees of freedom.

    Args:
        numerator_S: `[S]`, a sum over each sequence's tokens.
        denominator_S: `[S]`, what to divide by, such as a count of tokens.

    Returns:
        The estimate. NaN without an interval if the denominators sum to zero.
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
    """The quality of a reconstruction over all counted tokens. An SAE's target is its input.

    A crosscoder's hookpoints have equal weight. All are scaled to the same variance, so FVU and explained variance are
    the means over hookpoints. The cosine is a mean over hookpoints too.
    """

    fvu: Estimate
    """Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖², with the mean x̄ over the same tokens."""
    explained_variance: Estimate
    """One minus the FVU without the mean error, which a constant could correct, in the numerator."""
    cosine: Estimate
    """The mean over tokens of the cosine of x and x̂."""
    l0: Estimate
    """The mean number of latents that fire per token."""
    tokens: int
    """The number of counted tokens: neither excluded by id, nor by `max_norm` or a transcoder's `max_norm_out`."""
    dead: int
    """The number of latents that fired on none of the tokens."""
    num_latents: int
    density: Density
    """The distribution of firing densities over these tokens."""


@dataclass(frozen=True)
class Grafted:
    """The language model's predictions with the activations of one layer, or of all layers, replaced."""

    ce: Estimate
    """Cross-entropy with the true tokens, in nats per scored token, with the reconstruction spliced in."""
    ce_mean_ablated: Estimate
    """The same with the layer's mean activation for every token."""
    ce_zero_ablated: Estimate
    """The same with zeros."""
    ce_recovered: Estimate
    """(CE zero-ablated − CE spliced) / (CE zero-ablated − CE clean). 1 is perfect, 0 is no better than zeros."""
    ce_recovered_from_mean: Estimate
    """The same with the mean-ablated model in place of the zero-ablated one."""
    kl: Estimate
    """KL(clean ‖ spliced), in nats per scored token."""
    top1: Estimate
    """The share of scored tokens whose most likely prediction does not change."""


@dataclass(frozen=True)
class PartResult:
    """A crosscoder's reconstruction of one of its hookpoints. See `Reconstruction`."""

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
    """The language model with this prediction spliced in."""


@dataclass(frozen=True)
class LayerResult:
    """The results of one SAE, transcoder or crosscoder."""

    hookpoint: str
    """The hookpoint that it is named after, or "crosscoder" for several."""
    reconstruction: Reconstruction
    grafted: Grafted | None
    """None if the model has no head."""
    kind: str = "SAE"
    """"SAE", "transcoder" or "crosscoder"."""
    reads: tuple[str, ...] = ()
    """Names of the hookpoints that it reads."""
    writes: tuple[str, ...] = ()
    """Names of the hookpoints that it predicts, where it is spliced in."""
    parts: tuple[PartResult, ...] = ()
    """A crosscoder's results at each of its hookpoints."""
    skip: SkipResult | None = None
    """The results of a transcoder's skip connection."""
    other: Grafted | None = None
    """For a crosscoder of two models: the second model with its part of the reconstruction spliced in. `grafted` is the
    first model with the other part."""


@dataclass(frozen=True)
class OtherResult:
    """The results of the second of two models. None if it has no head."""

    model: str
    """The model's name."""
    ce_clean: Estimate | None
    together: Grafted | None


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a checkpoint."""

    layers: tuple[LayerResult, ...]
    together: Grafted | None
    """All coders spliced in at once. Each reads what the earlier ones left, but a crosscoder reads the clean model."""
    ce_clean: Estimate | None
    """Cross-entropy of the clean language model, in nats per scored token."""
    objective: str
    """"next token", "masked token", or why there is none."""
    sequences: int
    ctx_len: int
    tokens: int
    """The number of tokens that are not excluded by id."""
    scored: int
    """The number of scored predictions."""
    misplaced: tuple[str, ...] = ()
    """A sentence for each coder whose files say that it was trained on another model or hookpoint."""
    other: OtherResult | None = None
    """The second of two models."""

    def warnings(self) -> list[str]:
        """Return warnings about results that look wrong, are of another model or hookpoint, or rest on few tokens."""
        few = few_sequences(self.sequences, self.ctx_len)
        worse = [
            f"{layer.hookpoint}: FVU {layer.reconstruction.fvu.value:.2f} is worse than predicting the mean: this "
            f"{layer.kind} was probably not trained on this layer of this model"
            for layer in self.layers
            if layer.reconstruction.fvu.value > 1
        ]
        return [*self.misplaced, *([few] if few else []), *worse]

    def to_json(self) -> dict[str, Any]:
        """Return plain values. An estimate becomes `{"value", "low", "high"}`. Warnings are not included."""
        values = asdict(self)
        del values["misplaced"]
        if self.other is None:
            for each in (values, *values["layers"]):
                del each["other"]
        return {"format": EVAL_FORMAT, **values}
