"""The message to the host: one tensor per optimizer step, read into fields with names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.report.stats import LayerStats
from saekit.training.plan import UnitPlan
from saekit.training.statistics import SUMS, Tally, read_tally

FAULTS = ("activations", "loss", "gradient")
"""Where NaN or Inf can appear in an optimizer step, causes before effects."""
CHECKS = (*FAULTS, "dead", "dead_before", "error", "firings", "counted")
"""The numbers of each unit in every message, summed over ranks: on how many ranks each fault is; dead latents if the
step counts, and if it does not; squared error; firings; counted tokens. The selection's own sums come behind them."""
DEAD, DEAD_BEFORE, ERROR, COUNTS = (CHECKS.index(name) for name in ("dead", "dead_before", "error", "firings"))


@dataclass(frozen=True)
class StepMessage:
    """All that the host reads of an optimizer step."""

    tokens: int
    """Tokens that trained the units, over all ranks."""
    faults: dict[str, str]
    """By hookpoint, where NaN or Inf was on any rank: one of `FAULTS`. Not empty: the step must not count."""
    num_dead: dict[str, int]
    """Of each unit of this rank: its dead latents, if the step counts."""
    report: dict[str, LayerStats] | None = None
    """By hookpoint, in model order, since the last report, this step included if it counts; None if not asked for."""


@dataclass(frozen=True)
class Since:
    """The host's own counts of the steps since the last report."""

    steps: int = 0
    """Those that counted."""
    tokens: int = 0
    """Theirs, over all ranks."""


@dataclass(frozen=True)
class MessageReader:
    """Reads messages and reports, which are plain tensors on the CPU, summed over ranks."""

    units: Sequence[UnitPlan]
    """All L units of the run."""
    names: Sequence[str]
    """The units of this rank."""
    with_multi_topk: bool

    @property
    def widths(self) -> list[int]:
        """Return D_out of all units."""
        return [each.site.d_out for each in self.units]

    @property
    def tally_size(self) -> int:
        """Numbers in the tally of all units."""
        return len(self.units) * len(SUMS) + sum(self.widths)

    def everywhere(self, tally: Tally, places: Tensor) -> Tensor:
        """Lay this rank's tally out as a part of all units': zeros where a unit is elsewhere."""
        return tally.flat.new_zeros(self.tally_size).index_copy_(0, places, tally.flat)

    def read(self, numbers: Tensor, columns: int, tokens: int, since: Since, *, report: bool) -> StepMessage:
        """The fields of a message.

        Args:
            numbers: Dead latents of this rank's units; `[L, columns]` of `CHECKS` and the selections' sums; and with a
                report the tally of the steps before, and this step's.
            columns: See there.
            tokens: Of the step, over all ranks.
            since: Without the step.
            report: Whether there is one.
        """
        L, mine = len(self.units), len(self.names)
        checks_LC = numbers[mine : mine + L * columns].view(L, columns)
        faults = {
            unit.name: next(fault for fault, ranks in zip(FAULTS, row, strict=True) if ranks)
            for unit, row in zip(self.units, checks_LC[:, : len(FAULTS)].tolist(), strict=True)
            if any(row)
        }
        told = None
        if report:
            before, now = numbers[mine + L * columns :].split(self.tally_size)
            if faults:  # there NaN may be
                told = self.report(before, checks_LC[:, DEAD_BEFORE], since)
            else:
                with_it = Since(since.steps + 1, since.tokens + tokens)
                told = self.report(before + now, checks_LC[:, DEAD], with_it)
        num_dead = dict(zip(self.names, map(int, numbers[:mine].tolist()), strict=True))
        return StepMessage(tokens, faults, num_dead, told)

    def report(self, tally: Tensor, dead_L: Tensor, since: Since) -> dict[str, LayerStats]:
        """Make a report from the tally of all units, `Tally.flat`."""
        return {
            unit.name: read_tally(
                tally,
                number,
                self.widths,
                tokens=since.tokens,
                steps=since.steps,
                dead=int(dead),
                num_latents=unit.num_latents,
                with_multi_topk=self.with_multi_topk,
            )
            for number, (unit, dead) in enumerate(zip(self.units, dead_L.tolist(), strict=True))
        }


def read_later(value: Tensor) -> Callable[[], Tensor]:
    """Start to bring a tensor to the host.

    Returns:
        A function that gives it, on the CPU. It waits for the tensor, not for anything that is enqueued in between.
    """
    host = value.to("cpu", non_blocking=True)  # from a GPU into pinned memory
    arrived = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def read() -> Tensor:
        if arrived is not None:
            arrived.synchronize()
        return host

    return read
