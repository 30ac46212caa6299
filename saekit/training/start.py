"""Calibration on the first global batch, and initial weights that fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from saekit.activations.source import Batch, Source
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.sae import Sae
from saekit.sae.kernels.choose import Eager
from saekit.sae.kernels.torch_ops import gather_sum
from saekit.training.plan import RunPlan
from saekit.training.state import calibration
from saekit.training.statistics import Moments
from saekit.training.unit import Calibration
from saekit.units import percent

ROWS = 512
"""Tokens in the sample; each rank holds this many activations of every unit for a moment, on the CPU."""


def calibrate(
    batches: Sequence[Batch],
    plan: RunPlan,
    placement: Placement,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Calibration], dict[str, Tensor]]:
    """Measure each hookpoint's mean and variance over the first global batch, and take a sample of it. Collective.

    If the norm of some tokens exceeds `max_norm_multiple` times the median, a second pass measures mean and variance
    without them. Attention sinks, a few nearly equal tokens with a hundred times the norm of the others, would
    otherwise be all of the variance (Sun et al. 2024, arXiv 2402.17762).

    Args:
        batches: This rank's micro-batches of the first step.
        plan: The run; its source gives the activations.
        placement: The ranks.
        say: Told whether tokens are excluded.

    Returns:
        Both by hookpoint. The sample `[R, D]`, without excluded tokens, is empty unless initial weights, thresholds or
        the norm limit need it.

    Raises:
        UserError: If no token of the batch trains an SAE, or activations are not finite or do not vary.
    """
    if count_tokens(plan.source, batches, placement) == 0:
        raise UserError("--exclude-tokens leaves no token of the first batch to train on")
    cfg = plan.cfg
    sample, rows = None, {}
    if cfg.init == "fit" or cfg.sae.kind.fits or cfg.max_norm_multiple > 0:
        sample = Sample([plan.source.count(batch) for batch in batches], cfg.init_seed, placement)
    moments, longest = _moments(batches, plan, placement, sample=sample)
    limits: dict[str, float] = {}
    if sample is not None:
        rows = sample.complete()
    if cfg.max_norm_multiple > 0:
        limits = {name: cfg.max_norm_multiple * float(rows_RD.norm(dim=1).median()) for name, rows_RD in rows.items()}
        rows = {name: rows_RD[~(rows_RD.norm(dim=1) > limits[name])] for name, rows_RD in rows.items()}
    finite = all(bool(torch.isfinite(each.sum_squares)) for each in moments.values())  # else it is an error below
    if finite and any(longest[name] > limit for name, limit in limits.items()):
        before, (moments, _) = moments, _moments(batches, plan, placement, limits)
        shares = {name: 1 - float(moments[name].count / before[name].count) for name in moments}
        worst = max(shares, key=lambda name: shares[name])
        say(
            f"Tokens whose activation norm exceeds {cfg.max_norm_multiple:g} times the median are excluded "
            f"(--max-norm-multiple): {percent(shares[worst])} of the tokens of {worst}, and some of "
            f"{sum(share > 0 for share in shares.values())} of {len(shares)} layers"
        )
    # Its variance scales losses and rates, in which replicas must not differ, as numbers made on different devices may.
    measured = {name: calibration(name, each, limits.get(name)) for name, each in moments.items()}
    numbers = placement.gather({name: (each.variance, each.max_norm) for name, each in measured.items()})[0]
    return {name: Calibration(each.mean_D, *numbers[name]) for name, each in measured.items()}, rows


def count_tokens(source: Source, batches: Sequence[Batch], placement: Placement) -> int:
    """Count an optimizer step's tokens over all ranks. Collective."""
    # Ranks tell each other plain numbers: a tensor's sum would wait for everything that a GPU still has to do.
    return sum(count for (count,) in placement.exchange([sum(source.count(batch) for batch in batches)]))


def _counted(source: Source, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Give each hookpoint's activations `[N, D]` of counted tokens."""
    acts = source(batch)
    for name, x_ND in acts.of.items():
        yield name, x_ND if acts.counted_N is None else x_ND[acts.counted_N]


def _moments(
    batches: Sequence[Batch],
    plan: RunPlan,
    placement: Placement,
    limits: Mapping[str, float] | None = None,
    sample: Sample | None = None,
) -> tuple[dict[str, Moments], dict[str, float]]:
    """Sum each hookpoint's moments up to its norm limit over a global batch; find the largest norm. Collective."""
    moments = {name: Moments.zero(width, placement.device) for name, width in plan.widths.items()}
    longest = {name: torch.zeros((), device=placement.device) for name in plan.hookpoints}
    for micro, batch in enumerate(batches):
        for name, x_ND in _counted(plan.source, batch):
            norms_N = x_ND.float().norm(dim=1)
            moments[name].add(x_ND if limits is None else x_ND[~(norms_N > limits[name])])
            if sample is not None:
                sample.add(micro, name, x_ND)
            if len(norms_N):
                longest[name] = torch.maximum(longest[name], norms_N.max())
    everywhere = placement.gather([float(longest[name]) for name in plan.hookpoints])
    largest = dict(zip(plan.hookpoints, map(max, zip(*everywhere, strict=True)), strict=True))
    return {name: each.reduced(placement.sum) for name, each in moments.items()}, largest


class Sample:
    """Activations of some tokens of the first global batch: the same tokens for all units and on all ranks.

    Args:
        counted: Counted tokens in each of this rank's micro-batches of the step.
        seed: Of the choice.
        placement: The ranks. Making a sample is collective.
    """

    def __init__(self, counted: Sequence[int], seed: int, placement: Placement) -> None:
        self._placement = placement
        everywhere = placement.gather(list(counted))
        # Micro-batches are dealt out first, then ranks: so a token's number does not depend on how many there are.
        starts, total = [], 0
        for micro in range(len(counted)):
            before = sum(of_rank[micro] for of_rank in everywhere[: placement.rank])
            starts.append(total + before)
            total += sum(of_rank[micro] for of_rank in everywhere)
        self._spans = [(start, start + count) for start, count in zip(starts, counted, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.randperm(total, generator=generator)[:ROWS]
        self.rows: dict[str, Tensor] = {}
        """By hookpoint `[R, D]`, float32, on the CPU."""

    def add(self, micro: int, name: str, x_ND: Tensor) -> None:
        """Take the sampled tokens from a unit's activations of one of this rank's micro-batches."""
        start, stop = self._spans[micro]
        here_R = (self._numbers >= start) & (self._numbers < stop)
        rows_RD = self.rows.setdefault(name, torch.zeros(len(self._numbers), x_ND.shape[1]))
        rows_RD[here_R] = x_ND[(self._numbers[here_R] - start).to(x_ND.device)].float().cpu()

    def complete(self) -> dict[str, Tensor]:
        """Put together what the ranks have taken: by hookpoint `[R, D]`, float32, on the CPU. Collective."""
        for name, rows_RD in self.rows.items():  # one layer at a time
            self.rows[name] = self._placement.sum(rows_RD.to(self._placement.device)).cpu()
        return self.rows


@torch.no_grad()
def fit_encoder_(sae: Sae, rows_RD: Tensor) -> None:
    """Scale a fresh SAE's encoder, in place, so that the first reconstructions fit best.

        W_enc = s · W_dec        s = Σ_t (x_t − b_dec) · y_t / Σ_t ‖y_t‖²

    where y is the reconstruction of x with s = 1, without `b_dec`. The k active latents all point roughly in the
    direction of x, so together they overshoot several times. An SAE that starts like that unlearns it by pushing
    latents away from the data, where some of them die.

    Args:
        sae: A fresh SAE on the CPU whose `b_dec` is the activations' mean.
        rows_RD: `[R, D]`, float32: activations of R tokens.
    """
    x_RD = rows_RD - sae.b_dec
    acts_RK, indices_RK = sae.selection.before_fit().encode(x_RD, sae.W_dec, sae.b_enc, None, Eager())
    y_RD = gather_sum(acts_RK, indices_RK, sae.W_dec)  # without an [R, K, D] tensor
    fit = float((x_RD * y_RD).sum() / y_RD.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    sae.W_enc.copy_(sae.W_dec * (fit or 1.0))
