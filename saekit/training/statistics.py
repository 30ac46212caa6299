"""Sums over tokens, which become means only when they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.report.stats import LayerStats
from saekit.sae import Losses, Sae, SaeOutput


@dataclass
class Moments:
    """First and second moments of one layer's activations, in float64, so that large means do no harm."""

    sum_D: Tensor
    """`Σ_t x_t`, `[D]`."""
    sum_squares: Tensor
    """`Σ_t ‖x_t‖²`, a scalar."""
    count: Tensor
    """Tokens, a scalar."""

    @classmethod
    def zero(cls, d_in: int, device: torch.device) -> Moments:
        """Of no token."""
        zeros = torch.zeros(d_in + 2, dtype=torch.float64, device=device)
        return cls(zeros[:d_in], zeros[d_in], zeros[d_in + 1])

    def add(self, x_ND: Tensor) -> None:
        """Count a chunk of tokens."""
        x_ND = x_ND.to(torch.float64)
        self.sum_D += x_ND.sum(0)
        self.sum_squares += x_ND.square().sum()
        self.count += x_ND.shape[0]

    def add_centred(self, x_ND: Tensor, centre_D: Tensor, counted_N1: Tensor | None = None) -> None:
        """Count a chunk of tokens, or those of them that are `counted`, as seen from a fixed point near their mean.

        Then float32 will do within the chunk: nothing large cancels. On a CPU it is some 20 times as fast. Variance
        and deviation are the same from wherever one looks; the mean is the mean's distance from that point.
        """
        x_ND = x_ND - centre_D
        if counted_N1 is not None:
            x_ND *= counted_N1
        self.sum_D += x_ND.sum(0)
        self.sum_squares += x_ND.square().sum(1).sum(dtype=torch.float64)
        self.count += x_ND.shape[0] if counted_N1 is None else counted_N1.sum()

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> Moments:
        """The same over all ranks, in one reduction."""
        together = reduce(torch.cat([self.sum_D, self.sum_squares.view(1), self.count.view(1)]))
        return Moments(together[:-2], together[-2], together[-1])

    def mean_D(self) -> Tensor:
        """`[D]`, float64."""
        return self.sum_D / self.count

    def deviation(self) -> Tensor:
        """`Σ_t ‖x_t − mean‖²`, a float64 scalar."""
        return self.sum_squares - self.sum_D.square().sum() / self.count

    def total_variance(self) -> Tensor:
        """σ², the trace of the covariance, a float64 scalar."""
        return self.deviation() / self.count


def covered(sae: Sae, x_ND: Tensor) -> tuple[Tensor, Tensor | None]:
    """Activations with zeros in the place of those that the SAE is not for, and for `SaeOutput.only` which are left.

    Rows stay as many as they are, so that nobody waits for a GPU to count them, and NaN stays NaN, so that it is
    noticed. None stands for all.
    """
    if sae.max_norm is None:
        return x_ND, None
    covered_N1 = sae.covers(x_ND).unsqueeze(1)
    if x_ND.device.type == "cpu" and bool(covered_N1.all()):  # nearly always; a GPU would have to be waited for
        return x_ND, None
    return x_ND * covered_N1, covered_N1


NUM_SUMS = 5


@dataclass
class LayerWindow:
    """One layer's sums over the optimiser steps since the last report."""

    moments: Moments
    sums: Tensor
    """float64 `[5]`: squared error, squared error at 4k, firings, loss, AuxK loss. The last two are already divided
    by their step's tokens, so their mean is over steps."""
    selection_sums: Tensor
    """What selections are moved by (`SaeOutput.sums`): int64 `[num_sums]`. Of one step: no report needs it."""
    steps: int = 0

    @classmethod
    def empty(cls, d_in: int, device: torch.device, num_sums: int = 0) -> LayerWindow:
        """Over no step."""
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
        return cls(Moments.zero(d_in, device), sums, torch.zeros(num_sums, dtype=torch.int64, device=device))

    def observe(self, x_ND: Tensor, out: SaeOutput, losses: Losses, scale: float, centre_D: Tensor) -> None:
        """Count a chunk of tokens. Only numbers that exist already are read: no loss is computed again.

        `centre_D` is the layer's mean from calibration, the same in all windows of a run.
        """
        self.moments.add_centred(x_ND, centre_D, out.kept)
        if out.sums is not None:
            self.selection_sums += out.sums.flatten(0, -2).sum(0)
        zero = losses.total.new_zeros(())
        self.sums += torch.stack(
            [
                losses.mse.detach() / scale,
                zero if losses.multi_topk is None else losses.multi_topk.detach() / scale,
                out.fired.sum(),
                losses.total.detach(),
                zero if losses.auxk is None else losses.auxk.detach(),
            ]
        ).double()

    def add(self, other: LayerWindow) -> None:
        """Count the steps of another window as well."""
        self.moments.sum_D += other.moments.sum_D
        self.moments.sum_squares += other.moments.sum_squares
        self.moments.count += other.moments.count
        self.sums += other.sums
        self.steps += other.steps

    def row(self, dead: int, steps: int) -> Tensor:
        """Everything that is to be summed over ranks, in one float64 row that `read_row` understands.

        Start an `empty` window afterwards, so that both parts of every ratio are cleared together.
        """
        moments = self.moments
        known = self.sums.new_tensor([dead, steps])
        return torch.cat([self.sums, known, moments.sum_D, moments.sum_squares.view(1), moments.count.view(1)])


def read_row(row: Tensor, tokens: int, *, num_latents: int, with_multi_topk: bool) -> LayerStats:
    """The finished numbers of one layer over so many tokens of all ranks, from the sum of the ranks' rows."""
    squared_error, multi_error, firings, loss, auxk, dead, steps = row[: NUM_SUMS + 2].tolist()
    moments = Moments(row[NUM_SUMS + 2 : -2], row[-2], row[-1])
    deviation, counted = float(moments.deviation()), float(moments.count)
    return LayerStats(
        fvu=_ratio(squared_error, deviation),
        l0=_ratio(firings, counted),
        dead=int(dead),
        num_latents=num_latents,
        loss=_ratio(loss, steps),
        auxk_loss=_ratio(auxk, steps),
        multi_topk_fvu=_ratio(multi_error, deviation) if with_multi_topk else None,
        too_long=_ratio(tokens - counted, tokens),
    )


def _ratio(part: float, whole: float) -> float:
    """`part / whole`, NaN where there is no whole (a window without a token)."""
    return part / whole if whole else float("nan")
