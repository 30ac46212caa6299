"""Sums of an evaluation per sequence, from which its results are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saekit.analysis.measure import density
from saekit.analysis.results import Estimate, Grafted, Reconstruction, ratio
from saekit.analysis.subject import Answer, Total
from saekit.sae import SaeOutput


class Fidelity(NamedTuple):
    """The quality of a prediction. See `Reconstruction`."""

    fvu: Estimate
    explained_variance: Estimate
    cosine: Estimate


class ErrorSums:
    """Sums of one prediction's errors: float64, a row per sequence and a column for each of H hookpoints.

    Args:
        mean_D: The target's mean over all tokens.
        widths: The width of each hookpoint.
        sequences: S, the number of sequences on all ranks.
    """

    def __init__(self, mean_D: Tensor, widths: Sequence[int], sequences: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(sequences, *shape, dtype=torch.float64, device=mean_D.device)

        self.mean_D, self.widths = mean_D, list(widths)
        self.sums = {
            "tokens": zeros(),
            "error": zeros(len(self.widths)),  # Σ‖x − x̂‖²
            "bias": zeros(len(mean_D)),  # Σ (x − x̂)
            "deviation": zeros(len(self.widths)),  # Σ‖x − x̄‖²
            "cosine": zeros(len(self.widths)),
        }

    def add(self, rows: Tensor, x: Tensor, recon: Tensor, counted: Tensor) -> None:
        """Add a batch.

        Args:
            rows: Numbers of its sequences, int64 `[B]`. Empty for a padding batch.
            x: The target, `[B, T, D]`, float32.
            recon: The prediction, of the same shape.
            counted: Which tokens are counted, bool `[B, T]`.
        """
        error = (x - recon) * counted[..., None]
        deviation = (x - self.mean_D) * counted[..., None]
        pairs = zip(x.split(self.widths, -1), recon.split(self.widths, -1), strict=True)
        cosines = [torch.cosine_similarity(one, other, dim=2) * counted for one, other in pairs]
        values = {
            "tokens": counted.sum(1),
            "error": self._squares(error),
            "bias": error.sum(1, dtype=torch.float64),
            "deviation": self._squares(deviation),
            "cosine": torch.stack([each.sum(1, dtype=torch.float64) for each in cosines], 1),
        }
        for name, value in values.items():
            self.sums[name][rows] = value.double()[: len(rows)]

    def _squares(self, values: Tensor) -> Tensor:
        parts = values.split(self.widths, -1)
        return torch.stack([part.square().sum((1, 2), dtype=torch.float64) for part in parts], 1)

    def result(self, total: Total) -> tuple[Tensor, Fidelity, tuple[Fidelity, ...]]:
        """Compute each sequence's number of tokens, the total quality, and that of each of several hookpoints.

        The result is the same on all ranks. Collective.
        """
        sums = {name: total(value) for name, value in self.sums.items()}
        tokens_S, error_SH, deviation_SH = sums["tokens"], sums["error"], sums["deviation"]
        biases = zip(sums["bias"].split(self.widths, 1), error_SH.unbind(1), strict=True)
        scattered_SH = torch.stack([_scattered(bias_SD, error_S, tokens_S) for bias_SD, error_S in biases], 1)

        def fidelity(weights_H: Tensor) -> Fidelity:
            deviation_S = deviation_SH @ weights_H
            return Fidelity(
                fvu=ratio(error_SH @ weights_H, deviation_S),
                explained_variance=ratio(scattered_SH @ weights_H, deviation_S).complement(),
                cosine=ratio(sums["cosine"] @ (weights_H > 0).double(), tokens_S * (weights_H > 0).sum()),
            )

        each = torch.eye(len(self.widths), dtype=torch.float64, device=tokens_S.device)
        if len(self.widths) == 1:
            return tokens_S, fidelity(each[0]), ()
        # Scale each hookpoint by its own variance.
        return tokens_S, fidelity(1 / deviation_SH.sum(0)), tuple(map(fidelity, each))


def _scattered(bias_SD: Tensor, error_S: Tensor, tokens_S: Tensor) -> Tensor:
    """Compute the squared deviations of the error from its mean over all tokens, summed over each sequence's tokens."""
    bias_D = bias_SD.sum(0) / tokens_S.sum()
    return error_S - 2 * bias_SD @ bias_D + tokens_S * bias_D.square().sum()


class ReconstructionSums:
    """Sums of one coder's reconstruction: errors, L0 and firings, with a row per sequence.

    Args:
        mean_D: The target's mean over all tokens.
        widths: See `ErrorSums`.
        num_latents: M.
        sequences: S, the number of sequences on all ranks.
    """

    def __init__(self, mean_D: Tensor, widths: Sequence[int], num_latents: int, sequences: int) -> None:
        self.errors = ErrorSums(mean_D, widths, sequences)
        self.l0_S = torch.zeros(sequences, dtype=torch.float64, device=mean_D.device)
        self.fired_M = torch.zeros(num_latents, dtype=torch.int64, device=mean_D.device)

    def add(self, rows: Tensor, x: Tensor, out: SaeOutput, counted: Tensor) -> None:
        """Add a batch.

        Args:
            rows: Numbers of its sequences, int64 `[B]`. Empty for a padding batch.
            x: The target, `[B, T, D]`, float32.
            out: The coder's output.
            counted: Which tokens are counted, bool `[B, T]`.
        """
        self.errors.add(rows, x, out.recon, counted)
        fired = out.fired & counted[..., None]
        self.l0_S[rows] = fired.sum((1, 2)).double()[: len(rows)]
        self.fired_M += torch.bincount(out.indices[fired], minlength=len(self.fired_M))

    def result(self, total: Total) -> tuple[Reconstruction, tuple[Fidelity, ...]]:
        """Compute the results, and those of each of several hookpoints, the same on all ranks. Collective."""
        tokens_S, whole, parts = self.errors.result(total)
        fired_M, tokens = total(self.fired_M), int(tokens_S.sum())
        found = Reconstruction(
            **whole._asdict(),
            l0=ratio(total(self.l0_S), tokens_S),
            tokens=tokens,
            dead=int((fired_M == 0).sum()),
            num_latents=len(fired_M),
            density=density(fired_M.cpu(), tokens),
        )
        return found, parts


class AnswerSums:
    """Sums of one model's answers, clean or changed: float64 `[S]` each."""

    def __init__(self, sequences: int, device: torch.device) -> None:
        self.sums = Answer(*(torch.zeros(sequences, dtype=torch.float64, device=device) for _ in Answer._fields))

    def add(self, rows: Tensor, answer: Answer) -> None:
        """Add a batch. `rows` are the numbers of its sequences, empty for a padding batch."""
        for sums_S, value in zip(self.sums, answer, strict=True):
            sums_S[rows] = value[: len(rows)]

    def total(self, total: Total) -> Answer:
        """Sum over all ranks. Collective."""
        return Answer(*map(total, self.sums))


CHANGES = ("spliced", "mean-ablated", "zero-ablated")
"""The replacements of a layer's activations: its reconstruction, its mean, zeros."""
SKIP = "skip connection"
"""One more replacement, for a transcoder with a skip connection: its prediction without its latents."""


class GraftSums:
    """Sums of the changed model's answers, for one layer or for all together."""

    def __init__(self, sequences: int, device: torch.device) -> None:
        self.answers = {change: AnswerSums(sequences, device) for change in (*CHANGES, SKIP)}

    def result(self, clean_S: Tensor, scored_S: Tensor, total: Total, spliced_in: str = CHANGES[0]) -> Grafted:
        """Compute the results, the same on all ranks. Collective.

        Args:
            clean_S: The clean model's cross-entropy, summed over each sequence's scored tokens, of all ranks.
            scored_S: The number of scored tokens of each sequence.
            total: Sums a tensor over all ranks.
            spliced_in: The replacement to compare with the ablations. By default the reconstruction.
        """
        spliced, mean, zero = (self.answers[change].total(total) for change in (spliced_in, *CHANGES[1:]))

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
