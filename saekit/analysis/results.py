"""Sums of an evaluation, sequence by sequence, the estimates from them, and the file they go to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saekit.analysis.measure import Density, density
from saekit.analysis.student import standard_errors
from saekit.analysis.subject import Answer, Total
from saekit.runs.layout import EVAL_FORMAT
from saekit.sae import SaeOutput
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
    """The quality of an SAE's reconstruction, over all counted tokens."""

    fvu: Estimate
    """Fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖², with the mean x̄ over the same tokens."""
    explained_variance: Estimate
    """One minus the FVU without the mean error in the numerator, which a constant could correct."""
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
    """The language model's answers when the activations of one layer, or of all layers, are replaced."""

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
    misplaced: tuple[str, ...] = ()
    """A sentence for each SAE that was trained on another model or elsewhere in this one, where its files say so."""

    def warnings(self) -> list[str]:
        """Return warnings about results that look wrong, are of the wrong thing, or rest on too little."""
        few = few_sequences(self.sequences, self.ctx_len)
        worse = [
            f"{layer.hookpoint}: FVU {layer.reconstruction.fvu.value:.2f}, worse than the mean: this SAE was hardly "
            "trained on this layer of this model"
            for layer in self.layers
            if layer.reconstruction.fvu.value > 1
        ]
        return [*self.misplaced, *([few] if few else []), *worse]

    def to_json(self) -> dict[str, Any]:
        """Plain values; an estimate is `{"value", "low", "high"}`. `warnings` has what is not a number."""
        values = asdict(self)
        del values["misplaced"]
        return {"format": EVAL_FORMAT, **values}


class ReconstructionSums:
    """Of one layer; float64, one row per sequence.

    Args:
        mean_D: The layer's mean activation over all tokens.
        num_latents: Of the SAE.
        sequences: How many there are, on all ranks (S).
    """

    def __init__(self, mean_D: Tensor, num_latents: int, sequences: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(sequences, *shape, dtype=torch.float64, device=mean_D.device)

        self.mean_D = mean_D
        self.sums = {
            "tokens": zeros(),
            "error": zeros(),  # Σ‖x − x̂‖²
            "bias": zeros(len(mean_D)),  # Σ (x − x̂)
            "deviation": zeros(),  # Σ‖x − x̄‖²
            "cosine": zeros(),
            "l0": zeros(),
        }
        self.fired_M = torch.zeros(num_latents, dtype=torch.int64, device=mean_D.device)

    def add(self, rows: Tensor, x: Tensor, out: SaeOutput, counted: Tensor) -> None:
        """A batch.

        Args:
            rows: Numbers of its sequences, int64 `[B]`; none of a batch that only keeps pace.
            x: Activations `[B, T, D]`, float32.
            out: What the SAE made of them.
            counted: Which tokens are counted, bool `[B, T]`.
        """
        error = (x - out.recon) * counted[..., None]
        fired = out.fired & counted[..., None]
        deviation = (x - self.mean_D) * counted[..., None]
        values = {
            "tokens": counted.sum(1),
            "error": error.square().sum((1, 2), dtype=torch.float64),
            "bias": error.sum(1, dtype=torch.float64),
            "deviation": deviation.square().sum((1, 2), dtype=torch.float64),
            "cosine": (torch.cosine_similarity(x, out.recon, dim=2) * counted).sum(1, dtype=torch.float64),
            "l0": fired.sum((1, 2)),
        }
        for name, value in values.items():
            self.sums[name][rows] = value.double()[: len(rows)]
        self.fired_M += torch.bincount(out.indices[fired], minlength=len(self.fired_M))

    def result(self, total: Total) -> Reconstruction:
        """Return the numbers, the same on all ranks. Collective."""
        sums = {name: total(value) for name, value in self.sums.items()}
        fired_M = total(self.fired_M)
        tokens_S, error_S, bias_SD = sums["tokens"], sums["error"], sums["bias"]
        bias_D = bias_SD.sum(0) / tokens_S.sum()
        scattered_S = error_S - 2 * bias_SD @ bias_D + tokens_S * bias_D.square().sum()
        return Reconstruction(
            fvu=ratio(error_S, sums["deviation"]),
            explained_variance=ratio(scattered_S, sums["deviation"]).complement(),
            cosine=ratio(sums["cosine"], tokens_S),
            l0=ratio(sums["l0"], tokens_S),
            tokens=int(tokens_S.sum()),
            dead=int((fired_M == 0).sum()),
            num_latents=len(fired_M),
            density=density(fired_M.cpu(), int(tokens_S.sum())),
        )


class AnswerSums:
    """Of one model, clean or changed; float64 `[S]` each."""

    def __init__(self, sequences: int, device: torch.device) -> None:
        self.sums = Answer(*(torch.zeros(sequences, dtype=torch.float64, device=device) for _ in Answer._fields))

    def add(self, rows: Tensor, answer: Answer) -> None:
        """A batch; `rows` are its sequences' numbers, none of a batch that only keeps pace."""
        for sums_S, value in zip(self.sums, answer, strict=True):
            sums_S[rows] = value[: len(rows)]

    def total(self, total: Total) -> Answer:
        """Over all ranks. Collective."""
        return Answer(*map(total, self.sums))


CHANGES = ("spliced", "mean-ablated", "zero-ablated")
"""The replacements of a layer's activations: its reconstruction, its mean, zeros."""


class GraftSums:
    """Of one layer, or of all together."""

    def __init__(self, sequences: int, device: torch.device) -> None:
        self.answers = {change: AnswerSums(sequences, device) for change in CHANGES}

    def result(self, clean_S: Tensor, scored_S: Tensor, total: Total) -> Grafted:
        """Return the numbers, the same on all ranks. Collective.

        Args:
            clean_S: The clean model's cross-entropy, summed over each sequence's scored tokens, of all ranks.
            scored_S: How many those are.
            total: Over all ranks.
        """
        spliced, mean, zero = (self.answers[change].total(total) for change in CHANGES)

        def recovered(ablated_S: Tensor) -> Estimate:
            return ratio(ablated_S - spliced.ce, ablated_S - clean_S)

        return Grafted(
            ce=ratio(spliced.ce, scored_S),
            ce_mean_ablated=ratio(mean.ce, scored_S),
            ce_zero_ablated=ratio(zero.ce, scored_S),
            ce_recovered=recovered(zero.ce),
            ce_recovered_from_mean=recovered(mean.ce),
            kl=ratio(spliced.kl, scored_S),
            top1=ratio(spliced.agree, scored_S),
        )
