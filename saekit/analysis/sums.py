"""Sums over each sequence's tokens, from which every number of an evaluation is made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saekit.analysis.measure import density
from saekit.analysis.objective import Answer
from saekit.analysis.results import Estimate, Grafted, Reconstruction, ratio
from saekit.sae import SaeOutput

Total = Callable[[Tensor], Tensor]
"""A tensor summed over all ranks; each has filled in the rows of its own sequences and left the others zero."""


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

    def add(self, rows: Tensor, x: Tensor, out: SaeOutput, kept: Tensor) -> None:
        """A batch.

        Args:
            rows: Numbers of its sequences, int64 `[B]`; none of a batch that only keeps pace.
            x: Activations `[B, T, D]`, float32.
            out: What the SAE made of them.
            kept: Which tokens count, bool `[B, T]`.
        """
        error = (x - out.recon) * kept[..., None]
        fired = out.fired & kept[..., None]
        deviation = (x - self.mean_D) * kept[..., None]
        values = {
            "tokens": kept.sum(1),
            "error": error.square().sum((1, 2), dtype=torch.float64),
            "bias": error.sum(1, dtype=torch.float64),
            "deviation": deviation.square().sum((1, 2), dtype=torch.float64),
            "cosine": (torch.cosine_similarity(x, out.recon, dim=2) * kept).sum(1, dtype=torch.float64),
            "l0": fired.sum((1, 2)),
        }
        for name, value in values.items():
            self.sums[name][rows] = value.double()[: len(rows)]
        self.fired_M += torch.bincount(out.indices[fired], minlength=len(self.fired_M))

    def result(self, total: Total) -> Reconstruction:
        """The numbers, the same on all ranks. Collective."""
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
"""What is put in a layer's place: its reconstruction, its mean, nothing."""


class GraftSums:
    """Of one layer, or of all together."""

    def __init__(self, sequences: int, device: torch.device) -> None:
        self.answers = {change: AnswerSums(sequences, device) for change in CHANGES}

    def result(self, clean_S: Tensor, scored_S: Tensor, total: Total) -> Grafted:
        """The numbers, the same on all ranks. Collective.

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
