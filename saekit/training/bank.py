"""The bank: all units of a run, with their counters and statistics stacked in a few tensors.

In a step, the number of operations outside the units' own passes does not grow with the number of units
(`tests/training/test_fixed_step.py` counts them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import autoencoder, transcoder
from saekit.config import TrainConfig
from saekit.placement import LayerOptimizer, Placement, Single
from saekit.report.stats import LayerStats
from saekit.sae import Sae
from saekit.sae.selection.base import Selection
from saekit.sae.storage import IN
from saekit.training.message import COUNTS, ERROR, MessageReader, Since, StepMessage, read_later
from saekit.training.optimizers import base_lr, make_optimizer, rate_ratios
from saekit.training.plan import UnitPlan
from saekit.training.statistics import Segments, Tally
from saekit.training.unit import Calibration, Scales, Unit, dead_numbers

ONLY_UNIT = "layers.0"
"""The name of the unit in a bank of one."""


class Bank:
    """All units that this rank has a part in.

    Args:
        cfg: The training's configuration.
        placement: Where the units are. Their SAEs must be placed already.
        units: All units of the run, in model order.
        calibration: By hookpoint, at least for the units of this rank.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        placement: Placement,
        units: Sequence[UnitPlan],
        calibration: Mapping[str, Calibration],
    ) -> None:
        self.cfg, self.placement, device = cfg, placement, placement.device
        self.sites = [each.site for each in units]
        """The sites of all units of the run."""
        self.names = placement.layers()
        self._reader = MessageReader(units, self.names, cfg.sae.multi_topk)
        plans, everywhere = {each.name: each for each in units}, [each.name for each in units]
        saes = [placement.sae(name) for name in self.names]
        own = [calibration[name] for name in self.names]

        def float64(numbers: list[Any]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float64, device=device)

        self._variance_U, self._rms_U = float64([each.variance for each in own]), float64([each.rms for each in own])
        self._threshold_U = torch.tensor(
            [plans[name].dead_threshold for name in self.names], dtype=torch.int64, device=device
        )
        self._leads_U = float64([placement.leads(name) for name in self.names])
        at = [everywhere.index(name) for name in self.names]
        self._at_U = torch.tensor(at, dtype=torch.int64, device=device)

        self.latents = Segments([sae.num_latents for sae in saes], device)
        self.since_fired_F, self.fire_count_F, self._fired_F = (
            torch.zeros(self.latents.total, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._dead_F = torch.zeros(self.latents.total, dtype=torch.bool, device=device)
        self._dead_U = self._variance_U.new_zeros(len(self.names))
        self.num_dead = dict.fromkeys(self.names, 0)
        """Dead latents of each unit when the step began."""
        self.error_U = self._variance_U.clone()
        """Mean squared error per token in the last counted step, over all ranks; the variance before the first."""
        widths = [plans[name].site.d_out for name in self.names]
        self._tally, self._window = Tally(widths, device), Tally(widths, device)
        self._places = self._tally.places(at, self._reader.widths).to(device)
        self._since = Since()
        self._scales_3U = self._variance_U.new_zeros(3, len(self.names))
        self._auxk_U = self._scales_3U[1].float()
        kind = cfg.sae.kind
        self._selection_US = torch.zeros(len(self.names), kind.num_sums, dtype=torch.int64, device=device)
        self._selections = stacked([sae.selection for sae in saes], device) if kind.moves else []
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._pending: tuple[Tensor, Tensor] | None = None
        self._step_tokens = 0

        self.units = self._make_units(saes, own)

    def _make_units(self, saes: Sequence[Sae], calibrations: Sequence[Calibration]) -> dict[str, Unit]:
        """Make the units of this rank, with views of the stacked tensors."""
        cfg, placement, device = self.cfg, self.placement, self.placement.device
        fired, dead = self.latents.views(self._fired_F), self.latents.views(self._dead_F)
        return {
            name: Unit(
                name=name,
                sae=sae,
                cfg=cfg,
                backward=partial(placement.backward, name),
                centre_D=calibrations[number].mean_D.to(device),
                scales=Scales(self._scales_3U[0, number], self._auxk(number), self._scales_3U[2, number]),
                sums_7=self._tally.sums_U7[number],
                mean_D=self._tally.means[number],
                selection_sums=self._selection_US[number],
                fired_M=fired[number],
                may_sync=device.type == "cpu",
                frame=None if (frame := calibrations[number].frame) is None else frame.to(device),
                dead_M=dead[number] if cfg.revive_alpha > 0 else None,
            )
            for number, (name, sae) in enumerate(zip(self.names, saes, strict=True))
        }

    def _auxk(self, number: int) -> Tensor:
        return self._auxk_U[number] if self.cfg.auxk_relative_to == "residual" else self._scales_3U[1, number]

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Return views of a unit's counters that go into a checkpoint."""
        number = self.names.index(name)
        return {
            "tokens_since_fired": self.latents.views(self.since_fired_F)[number],
            "fire_count": self.latents.views(self.fire_count_F)[number],
            "error": self.error_U[number],
        }

    def load_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load what `state_of` returned. Call `count_dead` after the states of all units are loaded."""
        for key, view in self.state_of(name).items():
            view.copy_(state[key])

    def count_dead(self) -> None:
        """Count the latents that are dead now."""
        counts = self.latents.counts(self.latents.at_least(self.since_fired_F, self._threshold_U))
        self._dead_U.copy_(counts)
        self.num_dead = dict(zip(self.names, counts.tolist(), strict=True))

    def begin_(self, tokens: int) -> None:
        """Begin an optimizer step: fix its scales and its dead latents, and set its sums to zero.

        A loss is a sum over tokens divided by numbers that are fixed here, before any backward pass. With
        `auxk_relative_to residual`, AuxK's loss is divided by the error of the previous step. What dead latents are to
        predict shrinks as the SAE improves, and so does their gradient, while Adam's moments remember the gradients
        from when they were alive. The division keeps the AuxK loss near 1 at the start of every step, as in the code
        of Gao et al. 2024.

        Args:
            tokens: Tokens of the step that train, over all ranks.
        """
        self._step_tokens = tokens
        self._tokens.fill_(tokens)
        for sums in (self._tally.flat, self._selection_US, self._fired_F):
            sums.zero_()
        counted = self._tokens.clamp_min(1)
        torch.reciprocal(counted * self._variance_U, out=self._scales_3U[0])
        self._scales_3U[1].copy_(self._scales_3U[0])
        torch.reciprocal(counted * self._rms_U, out=self._scales_3U[2])
        if self.cfg.auxk_relative_to == "residual":
            # A perfect reconstruction has no error to divide by, so the divisor has a lower bound.
            self._auxk_U.copy_(1 / (counted * self.error_U.clamp_min(1e-9 * self._variance_U)))
        if self.cfg.revives:
            self._dead_F.copy_(self.latents.at_least(self.since_fired_F, self._threshold_U))
        if self.cfg.auxk_alpha > 0:
            for (name, unit), dead_M in zip(self.units.items(), self.latents.views(self._dead_F), strict=True):
                unit.aux_latents = dead_numbers(dead_M, self.num_dead[name])

    def finish(self, gradients: Mapping[str, Tensor], *, report: bool = False) -> Callable[[], StepMessage]:
        """End a step's passes: sum its statistics over ranks and start its message to the host. Collective.

        Args:
            gradients: What `Placement.collect` returned.
            report: Whether the message contains a report.

        Returns:
            A function that returns the message. It waits for the message to arrive, not for work enqueued after it.
        """
        fired_F = self.placement.share(self._fired_F)
        since_F = (self.since_fired_F + self._tokens).masked_fill_(fired_F > 0, 0)
        self._pending = since_F, fired_F
        dead_U = self.latents.counts(self.latents.at_least(since_F, self._threshold_U)).double()
        self._dead_after_U = dead_U
        gradient_U = torch.stack([gradients[name] for name in self.names]) if self.names else dead_U
        faulty_U3 = ~torch.cat([self._tally.finite(), gradient_U.isfinite()[:, None]], 1)
        columns = [
            faulty_U3.double(),
            torch.stack([dead_U, self._dead_U], 1) * self._leads_U[:, None],
            self._tally.sums_U7[:, :1],
            self.latents.counts(self._fired_F).double()[:, None],
            self._tally.sums_U7[:, 6:],
            self._selection_US.double(),
        ]
        checks_UC = torch.cat(columns, 1)
        C = checks_UC.shape[1]
        checks_LC = checks_UC.new_zeros(len(self._reader.units), C).index_copy_(0, self._at_U, checks_UC)
        mine = [checks_LC.flatten()]
        if report:
            mine += [self._reader.everywhere(each, self._places) for each in (self._window, self._tally)]
        together = self.placement.sum(torch.cat(mine))
        self._checks_UC = together[: checks_LC.numel()].view_as(checks_LC)[self._at_U]
        read, tokens = read_later(torch.cat([dead_U, together])), self._step_tokens
        return lambda: self._reader.read(read(), C, tokens, self._since, report=report)

    def advance_(self, message: StepMessage) -> None:
        """Add a step without faults to the counters and the window, and move the selections' thresholds."""
        assert self._pending is not None, "`finish` comes before `advance_`"
        since_F, fired_F = self._pending
        self.since_fired_F.copy_(since_F)
        self.fire_count_F += fired_F
        self._pending = None
        self._window.flat += self._tally.flat
        self._dead_U.copy_(self._dead_after_U)
        self._since = Since(self._since.steps + 1, self._since.tokens + message.tokens)
        self.num_dead = message.num_dead
        if self.cfg.auxk_relative_to == "residual":
            self.error_U.copy_(self._checks_UC[:, ERROR] / self._tokens.clamp_min(1))
        for selection, at_G in self._selections:
            counts = self._checks_UC[at_G, COUNTS:].long()
            selection.move_(counts[:, 0], counts[:, 1], counts[:, 2:], self._rms_U[at_G])

    def clear_window(self) -> None:
        """Set the sums of the window to zero."""
        self._window.flat.zero_()
        self._since = Since()

    def report(self) -> dict[str, LayerStats]:
        """Return a report of the counted steps in the window. Collective; waits for the device."""
        dead_L = self._leads_U.new_zeros(len(self._reader.units))
        dead_L.index_copy_(0, self._at_U, self._dead_U * self._leads_U)
        mine = [dead_L, self._reader.everywhere(self._window, self._places)]
        dead, window = self.placement.sum(torch.cat(mine)).cpu().split([len(each) for each in mine])
        return self._reader.report(window, dead, self._since)


def bank_of_one(
    cfg: TrainConfig,
    sae: Sae,
    calibration: Calibration,
    *,
    owns_gradient: bool = True,
    dead_threshold: int = 1,
    optimizer: Callable[[Sae], LayerOptimizer] | None = None,
) -> Bank:
    """Make a bank of one unit in this process, for the planner to meter and benchmarks to time.

    Args:
        cfg: The training's configuration.
        sae: A fresh coder on the device where it will be trained.
        calibration: The measurements of its activations.
        owns_gradient: Whether gradients may be deferred to the step, see `Placement.owns_gradient`.
        dead_threshold: Tokens without firing after which a latent is dead.
        optimizer: Makes the optimizer. By default, the configured one.
    """
    placement = Single(sae.device)
    placement.owns_gradient = owns_gradient  # type: ignore[misc]  # set on this instance only
    scale = calibration.rms if cfg.scale_biases else 1.0
    placement.place(
        {ONLY_UNIT: 1.0}, lambda _, *, blank=False: sae, optimizer or (lambda sae: make_optimizer(cfg, sae, scale))
    )
    read, written = Hookpoint(f"{ONLY_UNIT}{IN}", sae.d_in), Hookpoint(ONLY_UNIT, sae.d_out)
    site = transcoder(read, written) if sae.transcode else autoencoder(written)
    rates = base_lr(cfg, sae.num_latents, sae.d_in), rate_ratios(cfg, sae.d_in)
    return Bank(cfg, placement, [UnitPlan(site, sae.num_latents, *rates, dead_threshold)], {ONLY_UNIT: calibration})


def stacked(selections: Sequence[Selection], device: torch.device) -> list[tuple[Selection, Tensor]]:
    """Stack the state of selections of equal shape, so that one operation moves the thresholds of many units.

    Returns:
        For each group, one selection that moves all G of them (`Selection.stack_`), and their unit numbers, int64
        `[G]`.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, each in enumerate(selections):
        shapes = tuple(tensor.shape for tensor in each.state().values())
        groups.setdefault((each.k, each.num_latents, shapes), []).append(number)
    return [
        (Selection.stack_([selections[number] for number in group]), torch.tensor(group, device=device))
        for group in groups.values()
    ]
