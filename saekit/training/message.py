"""The message to the host: one tensor per optimizer step, read into named fields."""

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
"""The numbers of each unit in every message, summed over ranks: ranks with each fault; dead latents if the step counts,
and if it does not; squared error; firings; counted tokens. The selection's own sums follow them."""
DEAD, DEAD_BEFORE, ERROR, COUNTS = (CHECKS.index(name) for name in ("dead", "dead_before", "error", "firings"))


@dataclass(frozen=True)
class StepMessage:
    """What the host reads of an optimizer step."""

    tokens: int
    """Tokens that trained the units, over all ranks."""
    faults: dict[str, str]
    """By hookpoint, where any rank had NaN or Inf: one of `FAULTS`. A step with faults must not count."""
    num_dead: dict[str, int]
    """Dead latents of each unit of this rank, if the step counts."""
    report: dict[str, LayerStats] | None = None
    """By hookpoint, in model order, since the last report, with this step if it counts. None if not requested."""


@dataclass(frozen=True)
class Since:
    """The host's own counts of the steps since the last report."""

    steps: int = 0
    """Counted steps."""
    tokens: int = 0
    """Tokens of the counted steps, over all ranks."""


@dataclass(frozen=True)
class MessageReader:
    """Reads messages and reports from plain tensors on the CPU that are summed over ranks."""

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
        """Return the size of the tally of all units."""
        return len(self.units) * len(SUMS) + sum(self.widths)

    def everywhere(self, tally: Tally, places: Tensor) -> Tensor:
        """Copy this rank's tally into a tally of all units, with zeros for the units of other ranks."""
        return tally.flat.new_zeros(self.tally_size).index_copy_(0, places, tally.flat)

    def read(self, numbers: Tensor, columns: int, tokens: int, since: Since, *, report: bool) -> StepMessage:
        """Read a message.

        Args:
            numbers: Dead latents of this rank's units, then `[L, columns]` numbers: `CHECKS` and the selections' sums.
                With a report, two tallies follow: that of the earlier steps in the window, and this step's.
            columns: Numbers per unit.
            tokens: Tokens of the step, over all ranks.
            since: The window's counts without this step.
            report: Whether the message contains a report.
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
            if faults:  # this step's tally may hold NaN
                told = self.report(before, checks_LC[:, DEAD_BEFORE], since)
            else:
                with_it = Since(since.steps + 1, since.tokens + tokens)
                told = self.report(before + now, checks_LC[:, DEAD], with_it)
        num_dead = dict(zip(self.names, map(int, numbers[:mine].tolist()), strict=True))
        return StepMessage(tokens, faults, num_dead, told)

    def report(self, tally: Tensor, dead_L: Tensor, since: Since) -> dict[str, LayerStats]:
        """Return a report from the tally of all units, `Tally.flat`."""
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
    """Start to copy a tensor to the host.

    Returns:
        A function that returns the tensor on the CPU. It waits for the copy, not for work enqueued after it.
    """
    host = value.to("cpu", non_blocking=True)  # from a GPU into pinned memory
    arrived = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def read() -> Tensor:
        if arrived is not None:
            arrived.synchronize()
        return host

    return read
