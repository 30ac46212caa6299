"""Calibrates on the first global batch, and fits initial weights to a sample of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saekit.activations.sites import Site, join
from saekit.activations.source import Batch, Source
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.sae import Sae
from saekit.sae.kernels.choose import Eager
from saekit.sae.kernels.eager import unit_rows
from saekit.sae.kernels.torch_ops import gather_sum
from saekit.training.plan import RunPlan
from saekit.training.state import calibration
from saekit.training.statistics import Moments
from saekit.training.unit import Calibration
from saekit.units import percent

ROWS = 512
"""Tokens in the sample. Each rank holds this many activations of every unit on the CPU for a short time."""


def calibrate(
    batches: Sequence[Batch],
    plan: RunPlan,
    placement: Placement,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Calibration], dict[str, Tensor]]:
    """Measure each site's mean and variance over the first global batch, and take a sample of it. Collective.

    If the norm of some tokens exceeds `max_norm_multiple` times the median, a second pass measures mean and variance
    without them. Otherwise attention sinks, a few nearly equal tokens with about a hundred times the norm of the
    others, would account for almost all of the variance (Sun et al. 2024, arXiv 2402.17762).

    Args:
        batches: This rank's micro-batches of the first step.
        plan: The run; its source gives the activations.
        placement: The ranks.
        say: Receives a message if tokens are excluded by their norm.

    Returns:
        The calibration and the sample, both by site. The sample, float32 `[R, W]` without excluded tokens, is empty
        unless initial weights, thresholds or norm limits need it.

    Raises:
        UserError: If every token of the batch is excluded, or activations are not finite or do not vary.
    """
    if count_tokens(plan.source, batches, placement) == 0:
        raise UserError("every token of the first batch is excluded: see --exclude-tokens and special tokens")
    cfg = plan.cfg
    sample, rows = None, {}
    if cfg.init == "fit" or cfg.sae.kind.fits or cfg.max_norm_multiple > 0:
        sample = Sample([plan.source.count(batch) for batch in batches], cfg.init_seed, placement)
    moments, longest = _moments(batches, plan, placement, sample=sample)
    limits: dict[str, list[float]] = {}
    if sample is not None:
        rows = sample.complete()
    if cfg.max_norm_multiple > 0:
        limits = _limit_norms_(plan.sites, rows, cfg.max_norm_multiple)
    finite = all(bool(torch.isfinite(each.sum_squares)) for parts in moments.values() for each in parts)
    pairs = [pair for name, most in limits.items() for pair in zip(longest[name], most, strict=True)]
    if finite and any(norm > most for norm, most in pairs):
        before, (moments, _) = moments, _moments(batches, plan, placement, limits)
        shares = {name: 1 - float(moments[name][0].count / before[name][0].count) for name in moments}
        worst = max(shares, key=lambda name: shares[name])
        say(
            f"Tokens whose activation norm exceeds {cfg.max_norm_multiple:g} times the median are excluded "
            f"(--max-norm-multiple), in {sum(share > 0 for share in shares.values())} of {len(shares)} layers: "
            f"at most {percent(shares[worst])} of a layer's tokens ({worst})"
        )
    # All ranks take rank 0's numbers: they scale losses and learning rates, in which replicas must not differ, but
    # sums made on different devices may.
    measured = {site.name: calibration(site, moments[site.name], limits.get(site.name, [])) for site in plan.sites}
    numbers = placement.gather({name: each.numbers() for name, each in measured.items()})[0]
    return {name: replace(each, **numbers[name]) for name, each in measured.items()}, rows


def _limit_norms_(sites: Sequence[Site], rows: dict[str, Tensor], multiple: float) -> dict[str, list[float]]:
    """Return each site's norm limits, and remove the rows that exceed them from the sample, in place.

    Args:
        sites: The sites.
        rows: The sample by site, `[R, W]`.
        multiple: The limit as a multiple of the median norm.
    """
    limits: dict[str, list[float]] = {}
    for site in sites:
        norms_2R = _norms(site, rows[site.name])
        limits[site.name] = [multiple * float(norms_R.median()) for norms_R in norms_2R]
        rows[site.name] = rows[site.name][_within(norms_2R, limits[site.name])]
    return limits


def count_tokens(source: Source, batches: Sequence[Batch], placement: Placement) -> int:
    """Count an optimizer step's counted tokens over all ranks. Collective."""
    # Ranks exchange plain numbers: summing a tensor would wait for all work that is queued on the GPU.
    return sum(count for (count,) in placement.exchange([sum(source.count(batch) for batch in batches)]))


def _counted(plan: RunPlan, batch: Batch) -> Iterator[tuple[Site, Tensor]]:
    """Yield each site with its joined activations, `[N, W]`, of counted tokens."""
    acts = plan.source(batch)
    joined = join(acts.of, plan.sites)
    for site in plan.sites:
        x_NW = joined.pop(site.name)
        yield site, x_NW if acts.counted_N is None else x_NW[acts.counted_N]


def _norms(site: Site, x_NW: Tensor) -> Tensor:
    """Return the norms of the input, `[1, N]`; for a transcoder also those of its target, `[2, N]`."""
    read_and_written = [site.d_in, site.d_out] if site.transcodes else [site.d_in]
    return torch.stack([part.float().norm(dim=1) for part in x_NW.split(read_and_written, 1)])


def _within(norms_2N: Tensor, limits: Sequence[float]) -> Tensor:
    """Tell which tokens have no norm above its limit: bool `[N]`. NaN is not above any limit."""
    return ~(norms_2N > norms_2N.new_tensor(limits)[:, None]).any(0)


def _moments(
    batches: Sequence[Batch],
    plan: RunPlan,
    placement: Placement,
    limits: Mapping[str, Sequence[float]] | None = None,
    sample: Sample | None = None,
) -> tuple[dict[str, list[Moments]], dict[str, list[float]]]:
    """Sum the moments of each part of each site over a global batch, and find the largest norms. Collective.

    Args:
        batches: This rank's micro-batches.
        plan: The run.
        placement: The ranks.
        limits: By site, norms above which tokens are left out of the moments; None for no limit.
        sample: Receives the sampled tokens, if given.

    Returns:
        By site, the moments of each of its parts, and the largest norms (of the input, and of a transcoder's target).
    """
    device = placement.device
    moments = {site.name: [Moments.zero(part.width, device) for part in site.parts] for site in plan.sites}
    longest = {site.name: torch.zeros(2 if site.transcodes else 1, device=device) for site in plan.sites}
    for micro, batch in enumerate(batches):
        for site, x_NW in _counted(plan, batch):
            norms_2N = _norms(site, x_NW)
            counted_NW = x_NW if limits is None else x_NW[_within(norms_2N, limits[site.name])]
            widths = [part.width for part in site.parts]
            for each, x_ND in zip(moments[site.name], counted_NW.split(widths, 1), strict=True):
                each.add(x_ND)
            if sample is not None:
                sample.add(micro, site.name, x_NW)
            if len(x_NW):
                longest[site.name] = torch.maximum(longest[site.name], norms_2N.amax(1))
    everywhere = placement.gather([longest[name].tolist() for name in plan.hookpoints])
    largest = {
        name: [max(parts) for parts in zip(*ranks, strict=True)]
        for name, ranks in zip(plan.hookpoints, zip(*everywhere, strict=True), strict=True)
    }
    return {name: [each.reduced(placement.sum) for each in parts] for name, parts in moments.items()}, largest


class Sample:
    """A sample of the first global batch's activations, of the same tokens for all units and on all ranks.

    Args:
        counted: The number of counted tokens in each of this rank's micro-batches of the step.
        seed: The seed of the random choice of tokens.
        placement: The ranks. Making a sample is collective.
    """

    def __init__(self, counted: Sequence[int], seed: int, placement: Placement) -> None:
        self._placement = placement
        everywhere = placement.gather(list(counted))
        # Tokens are numbered by micro-batch, then by rank, so a token's number does not depend on the number of ranks.
        starts, total = [], 0
        for micro in range(len(counted)):
            before = sum(of_rank[micro] for of_rank in everywhere[: placement.rank])
            starts.append(total + before)
            total += sum(of_rank[micro] for of_rank in everywhere)
        self._spans = [(start, start + count) for start, count in zip(starts, counted, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.randperm(total, generator=generator)[:ROWS]
        self.rows: dict[str, Tensor] = {}
        """By site `[R, W]`, float32, on the CPU."""

    def add(self, micro: int, name: str, x_ND: Tensor) -> None:
        """Take the sampled tokens from a unit's activations of one of this rank's micro-batches."""
        start, stop = self._spans[micro]
        here_R = (self._numbers >= start) & (self._numbers < stop)
        rows_RD = self.rows.setdefault(name, torch.zeros(len(self._numbers), x_ND.shape[1]))
        rows_RD[here_R] = x_ND[(self._numbers[here_R] - start).to(x_ND.device)].float().cpu()

    def complete(self) -> dict[str, Tensor]:
        """Sum the ranks' parts and return the sample: by hookpoint `[R, D]`, float32, on the CPU. Collective."""
        for name, rows_RD in self.rows.items():  # one layer at a time
            self.rows[name] = self._placement.sum(rows_RD.to(self._placement.device)).cpu()
        return self.rows


@torch.no_grad()
def fit_(sae: Sae, rows_RD: Tensor, targets_RD: Tensor | None = None) -> None:
    """Scale a fresh coder's encoder, in place, so that its first predictions have the least squared error.

        W_enc = s · W        s = Σ_t (y_t − b_dec) · p_t / Σ_t ‖p_t‖²

    Here p is the prediction of y with s = 1, without `b_dec`. For an autoencoder y is x and W is `W_dec`. Without the
    scale, its k active latents all point roughly in the direction of x, so their sum is several times too long.
    Training would correct this by pushing latents away from the data, and some of them would die. For a transcoder W is
    `W_enc` with rows of norm 1, and the rows of `W_dec` are the images of those rows under a linear map that is fitted
    to the sample (`linear_map`), scaled to norm 1.

    Args:
        sae: A fresh coder on the CPU whose `b_dec` is the mean of its target.
        rows_RD: `[R, D]`, float32: the input for R tokens, centred for a transcoder.
        targets_RD: `[R, D_out]`, float32: a transcoder's target; None for others.
    """
    W_MD: Tensor = sae.W_dec
    if targets_RD is None:
        x_RD = y_RD = rows_RD - sae.b_dec
    else:
        W_MD, x_RD, y_RD = unit_rows(sae.W_enc), rows_RD, targets_RD - sae.b_dec
        sae.W_dec.copy_(unit_rows(W_MD @ linear_map(x_RD, y_RD)))
    acts_RK, indices_RK = sae.selection.before_fit().encode(x_RD, W_MD, sae.b_enc, None, Eager())
    predicted_RD = gather_sum(acts_RK, indices_RK, sae.W_dec)  # without an [R, K, D] tensor
    tiny = torch.finfo(torch.float32).tiny
    scale = float((y_RD * predicted_RD).sum() / predicted_RD.square().sum().clamp_min(tiny))
    sae.W_enc.copy_(W_MD * (scale or 1.0))


def linear_map(x_RD: Tensor, y_RD: Tensor) -> Tensor:
    """Fit a linear map by ridge regression: return A, float32 `[D, D_out]`, with `y ≈ x A` on the sample.

    The ridge is a tenth of the Gram matrix's mean diagonal element. A sample may have fewer tokens than dimensions.
    """
    x_RD, y_RD = x_RD.double(), y_RD.double()
    gram_DD = x_RD.T @ x_RD
    gram_DD.diagonal().add_(0.1 * gram_DD.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    return torch.linalg.solve(gram_DD, x_RD.T @ y_RD).float()
