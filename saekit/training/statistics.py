"""Sums over tokens, stacked over units in one tensor. Reading them makes means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.report.stats import LayerStats
from saekit.sae import Losses, Sae, SaeOutput


@dataclass
class Moments:
    """First and second moments of one hookpoint's activations, in float64, so that large means do not cancel."""

    sum_D: Tensor
    """`Σ_t x_t`, `[D]`."""
    sum_squares: Tensor
    """`Σ_t ‖x_t‖²`, a scalar."""
    count: Tensor
    """Tokens, a scalar."""

    @classmethod
    def zero(cls, d_in: int, device: torch.device) -> Moments:
        """Return the moments of no tokens."""
        zeros = torch.zeros(d_in + 2, dtype=torch.float64, device=device)
        return cls(zeros[:d_in], zeros[d_in], zeros[d_in + 1])

    def add(self, x_ND: Tensor) -> None:
        """Add a chunk of tokens, `[N, D]`."""
        x_ND = x_ND.to(torch.float64)
        self.sum_D += x_ND.sum(0)
        self.sum_squares += x_ND.square().sum()
        self.count += x_ND.shape[0]

    def add_centred(self, x_ND: Tensor, centre_D: Tensor, counted_N1: Tensor | None = None) -> None:
        """Add the counted tokens of a chunk, after subtracting a fixed point near their mean.

        No large numbers cancel then, so float32 is enough within the chunk. On a CPU it is about 20 times as fast as
        float64. Variance and deviation do not depend on the point. `mean_D` becomes relative to it.

        Args:
            x_ND: `[N, D]`.
            centre_D: `[D]`, the point.
            counted_N1: bool `[N, 1]`; None if all tokens are counted.
        """
        x_ND = x_ND - centre_D
        if counted_N1 is not None:
            x_ND *= counted_N1
        self.sum_D += x_ND.sum(0)
        self.sum_squares += x_ND.square().sum(1).sum(dtype=torch.float64)
        self.count += x_ND.shape[0] if counted_N1 is None else counted_N1.sum()

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> Moments:
        """Return the moments over all ranks, with one call of `reduce`, which sums a tensor over ranks."""
        together = reduce(torch.cat([self.sum_D, self.sum_squares.view(1), self.count.view(1)]))
        return Moments(together[:-2], together[-2], together[-1])

    def mean_D(self) -> Tensor:
        """Return the mean, float64 `[D]`."""
        return self.sum_D / self.count

    def deviation(self) -> Tensor:
        """Return `Σ_t ‖x_t − mean‖²`, a float64 scalar."""
        return self.sum_squares - self.sum_D.square().sum() / self.count

    def total_variance(self) -> Tensor:
        """Return σ², the trace of the covariance, a float64 scalar."""
        return self.deviation() / self.count


def without_excluded(
    sae: Sae,
    x_ND: Tensor,
    counted_N1: Tensor | None = None,
    *,
    y_ND: Tensor | None = None,
    may_sync: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Mask excluded tokens: put zeros in place of their activations, and keep the number of rows.

    The host therefore need not wait for a GPU to count the tokens. NaN stays NaN, so that it is noticed.

    Args:
        sae: Its `max_norm` and `max_norm_out` exclude tokens whose activations have a larger norm.
        x_ND: `[N, D]`, the input.
        counted_N1: bool `[N, 1]`, False for tokens that are excluded by their id; None if there are none.
        y_ND: `[N, D_out]`, a transcoder's target.
        may_sync: Whether the host may read from the device whether any norm is too large, which is rare.

    Returns:
        The activations, and bool `[N, 1]` for `SaeOutput.masked`: which tokens are counted; None if all are.
    """
    if sae.max_norm is not None or sae.max_norm_out is not None:
        short_N1 = sae.counted(x_ND, y_ND).unsqueeze(1)
        if not (may_sync and bool(short_N1.all())):
            counted_N1 = short_N1 if counted_N1 is None else short_N1 & counted_N1
    return (x_ND, None) if counted_N1 is None else (x_ND * counted_N1, counted_N1)


class Segments:
    """The segments of U units' latents in one flat tensor.

    Args:
        sizes: Latents of each unit.
        device: The device of the flat tensors.
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
"""The sums over each unit's tokens: squared error, squared error at 4k, firings, loss and AuxK's loss (both already
divided by the step's tokens, so their means are over steps), squared norms of the target, and counted tokens."""


class Tally:
    """The sums of U units over some optimizer steps, in one float64 tensor: `[U · 7]`, then `Σ_t x_t` of each unit.

    Args:
        widths: D_out of each unit.
        device: The tensor's device.
    """

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        U, self.widths = len(widths), list(widths)
        self.flat = torch.zeros(U * len(SUMS) + sum(widths), dtype=torch.float64, device=device)
        self.sums_U7 = self.flat[: U * len(SUMS)].view(U, len(SUMS))
        self.means = self.flat[U * len(SUMS) :].split(self.widths)
        """`Σ_t (x_t − centre)` of each unit, `[D_out]`."""

    def finite(self) -> Tensor:
        """Tell whether each unit's target and its losses are finite: bool `[U, 2]`.

        The float64 sum of squares of float32 values is finite exactly if all values are.
        """
        return torch.stack([self.sums_U7[:, 5].isfinite(), self.sums_U7[:, :5].isfinite().all(1)], 1)

    def places(self, among: Sequence[int], widths: Sequence[int]) -> Tensor:
        """Return the places of this tally's numbers in a tally of all units: int64, as long as `flat`.

        Args:
            among: For each unit of this tally, its number among all units.
            widths: D_out of all units.
        """
        starts = [len(widths) * len(SUMS) + sum(widths[:number]) for number in among]
        rows = [torch.arange(len(SUMS)) + number * len(SUMS) for number in among]
        means = [torch.arange(widths[number]) + start for number, start in zip(among, starts, strict=True)]
        return torch.cat([*rows, *means]) if among else torch.zeros(0, dtype=torch.int64)


def observe_(
    sums_7: Tensor, mean_D: Tensor, x_ND: Tensor, out: SaeOutput, losses: Losses, scale: Tensor, centre_D: Tensor
) -> None:
    """Add a chunk of tokens to one unit's part of a tally. Reuses what the passes have computed.

    Args:
        sums_7: The unit's row of `Tally.sums_U7`.
        mean_D: The unit's part of `Tally.means`.
        x_ND: `[N, D_out]`, the target.
        out: The prediction.
        losses: The losses of the chunk.
        scale: The factor on the squared errors in the losses, a scalar.
        centre_D: `[D_out]`, the mean of the first batch, the same in all tallies of a run.
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
    """Compute one unit's statistics from a tally.

    Args:
        flat: `Tally.flat` of all units, summed over ranks, on the CPU.
        number: The unit's number.
        widths: D_out of all units.
        tokens: Tokens of the summed steps, over all ranks.
        steps: The number of summed steps.
        dead: Dead latents after the last of these steps.
        num_latents: M.
        with_multi_topk: Whether the loss has a Multi-TopK term (at 4k latents).
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
    """Return `part / whole`, or NaN if `whole` is 0 (a window without counted tokens)."""
    return part / whole if whole else float("nan")
