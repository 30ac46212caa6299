"""Sums over tokens, which become means when they are read; those of all units are in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.report.stats import LayerStats
from saekit.sae import Losses, Sae, SaeOutput


@dataclass
class Moments:
    """First and second moments of one hookpoint's activations, in float64, so that large means do no harm."""

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
        """Count the `counted` tokens of a chunk (None for all), as seen from a fixed point near their mean.

        Within the chunk float32 is enough then: nothing large cancels. On a CPU it is some 20 times as fast. Variance
        and deviation do not depend on the point; the mean is the mean's distance from it.
        """
        x_ND = x_ND - centre_D
        if counted_N1 is not None:
            x_ND *= counted_N1
        self.sum_D += x_ND.sum(0)
        self.sum_squares += x_ND.square().sum(1).sum(dtype=torch.float64)
        self.count += x_ND.shape[0] if counted_N1 is None else counted_N1.sum()

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> Moments:
        """Return the same over all ranks, in one reduction."""
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


def without_excluded(
    sae: Sae,
    x_ND: Tensor,
    counted_N1: Tensor | None = None,
    *,
    y_ND: Tensor | None = None,
    may_ask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Put zeros in place of excluded tokens' activations; the number of rows stays the same.

    The host then need not wait for a GPU to count them, and NaN stays NaN, so that it is noticed.

    Args:
        sae: Its `max_norm` and `max_norm_out` exclude tokens with activations whose norm is larger.
        x_ND: `[N, D]`.
        y_ND: `[N, D_out]`, a transcoder's target.
        counted_N1: bool `[N, 1]`, False for tokens that are excluded already, by their id; None if there is none.
        may_ask: Whether the host may read whether any norm is too large; almost always none is.

    Returns:
        The activations, and bool `[N, 1]` for `SaeOutput.masked`: which tokens are counted. None if none is excluded.
    """
    if sae.max_norm is not None or sae.max_norm_out is not None:
        short_N1 = sae.counted(x_ND, y_ND).unsqueeze(1)
        if not (may_ask and bool(short_N1.all())):
            counted_N1 = short_N1 if counted_N1 is None else short_N1 & counted_N1
    return (x_ND, None) if counted_N1 is None else (x_ND * counted_N1, counted_N1)


class Segments:
    """The places of all units' latents (or dimensions) in one flat tensor.

    Args:
        sizes: Of each of U units.
        device: Of the tensors.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = list(sizes)
        self.total = sum(self.sizes)
        self.alike = len(set(self.sizes)) < 2
        self._ends_U = torch.tensor(self.sizes, dtype=torch.int64).cumsum(0).sub(1).to(device)
        self._sizes_U = torch.tensor(self.sizes, dtype=torch.int64).to(device)

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Return each unit's part of a flat tensor `[total]`."""
        return flat.split(self.sizes)

    def counts(self, flat: Tensor) -> Tensor:
        """Return the sum of each unit's part of a flat tensor of whole numbers or booleans: int64 `[U]`."""
        if self.alike:
            return flat.view(len(self.sizes), -1).sum(1) if self.sizes else flat.new_zeros(0, dtype=torch.int64)
        return flat.cumsum(0)[self._ends_U].diff(prepend=self._ends_U.new_zeros(1))

    def at_least(self, flat: Tensor, least_U: Tensor) -> Tensor:
        """Tell which numbers of a flat tensor reach their unit's threshold: bool `[total]`."""
        if self.alike:
            return (flat.view(len(self.sizes), -1) >= least_U[:, None]).view(-1) if self.sizes else flat.bool()
        return flat >= least_U.repeat_interleave(self._sizes_U, output_size=self.total)


SUMS = ("squared_error", "multi_error", "firings", "loss", "auxk_loss", "sum_squares", "counted")
"""The sums over each unit's tokens: squared error and that at 4k, values above zero, loss and AuxK's loss (both
divided by the step's tokens already, so that their mean is over steps), and the moments of the target."""


class Tally:
    """The sums of U units over some optimizer steps, float64, all in one tensor: `[U · 7]`, then `Σ_t x_t` of each.

    Args:
        widths: D of each unit.
        device: Where.
    """

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        U, self.widths = len(widths), list(widths)
        self.flat = torch.zeros(U * len(SUMS) + sum(widths), dtype=torch.float64, device=device)
        self.sums_U7 = self.flat[: U * len(SUMS)].view(U, len(SUMS))
        self.means = self.flat[U * len(SUMS) :].split(self.widths)
        """`Σ_t (x_t − centre)` of each unit, `[D]`."""

    def finite(self) -> Tensor:
        """Tell whether each unit's target and its losses are finite: bool `[U, 2]`.

        A float64 sum of squares of float32 values is finite if they all are.
        """
        return torch.stack([self.sums_U7[:, 5].isfinite(), self.sums_U7[:, :5].isfinite().all(1)], 1)

    def places(self, among: Sequence[int], widths: Sequence[int]) -> Tensor:
        """Return where the numbers of these units are in the tally of more units: int64, as long as `flat`.

        Args:
            among: The number of each of these units among all of them.
            widths: D of all of them.
        """
        starts = [len(widths) * len(SUMS) + sum(widths[:number]) for number in among]
        rows = [torch.arange(len(SUMS)) + number * len(SUMS) for number in among]
        means = [torch.arange(widths[number]) + start for number, start in zip(among, starts, strict=True)]
        return torch.cat([*rows, *means]) if among else torch.zeros(0, dtype=torch.int64)


def observe_(
    sums_7: Tensor, mean_D: Tensor, x_ND: Tensor, out: SaeOutput, losses: Losses, scale: Tensor, centre_D: Tensor
) -> None:
    """Add a chunk of tokens to one unit's part of a tally. Only numbers that exist already are read.

    Args:
        sums_7: The unit's row of `Tally.sums_U7`.
        mean_D: Its part of `Tally.means`.
        x_ND: `[N, D_out]`, the target.
        out: The prediction.
        losses: Of the chunk.
        scale: By which the squared errors were multiplied, a scalar.
        centre_D: The mean of the first batch, the same in all tallies of a run.
    """
    zero = losses.total.new_zeros(())
    sums_7[:5] += torch.stack(
        [
            losses.mse.detach() / scale,
            zero if losses.multi_topk is None else losses.multi_topk.detach() / scale,
            out.fired.sum(),
            losses.total.detach(),
            zero if losses.auxk is None else losses.auxk.detach(),
        ]
    ).double()
    Moments(mean_D, sums_7[5], sums_7[6]).add_centred(x_ND, centre_D, out.counted)


def read_tally(
    flat: Tensor,
    number: int,
    widths: Sequence[int],
    *,
    tokens: int,
    steps: int,
    dead: int,
    num_latents: int,
    with_multi_topk: bool,
) -> LayerStats:
    """Return the finished numbers of one unit.

    Args:
        flat: On the CPU, `Tally.flat` of all units, summed over ranks.
        number: The unit's.
        widths: D of all units.
        tokens: Of the steps that are summed, over all ranks.
        steps: How many steps those are.
        dead: Latents that are dead after the last of them.
        num_latents: All latents.
        with_multi_topk: Whether the loss has a part from 4k latents.
    """
    row = flat[number * len(SUMS) : (number + 1) * len(SUMS)]
    start = len(widths) * len(SUMS) + sum(widths[:number])
    deviation = float(Moments(flat[start : start + widths[number]], row[5], row[6]).deviation())
    squared_error, multi_error, firings, loss, auxk, _, counted = row.tolist()
    return LayerStats(
        fvu=_ratio(squared_error, deviation),
        l0=_ratio(firings, counted),
        dead=dead,
        num_latents=num_latents,
        loss=_ratio(loss, steps),
        auxk_loss=_ratio(auxk, steps),
        multi_topk_fvu=_ratio(multi_error, deviation) if with_multi_topk else None,
        too_long=_ratio(tokens - counted, tokens),
    )


def _ratio(part: float, whole: float) -> float:
    """`part / whole`, NaN where there is no whole (a window without a token)."""
    return part / whole if whole else float("nan")
