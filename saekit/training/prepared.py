"""Optimizers whose step is a fixed graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PreparedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that takes a step in two parts: `prepare()` on the host, then `step()` on the device.

    `prepare` counts the step and computes every number that changes from step to step. It leaves them in one tensor
    that stays at its place in memory. `step` reads tensors only: no number of Python's that changes, no value that the
    host waits for, no shape that depends on data. A GPU may therefore record `step` once and replay it.

    `prepare` expects that each parameter has a gradient when `step` runs: it counts the step for all of them.
    """

    _static: Tensor | None = None
    _rows: dict[int, Tensor]

    @torch.no_grad()
    def prepare(self) -> None:
        """Get everything ready for the next `step`, at the learning rates of the groups, without waiting for a GPU."""
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        if not pairs:
            return
        rows, device = [self._advance(*each) for each in pairs], pairs[0][0].device
        # The allocator of pinned memory keeps it until the copy is done, so the next step may not overwrite it.
        numbers = torch.tensor(rows, dtype=torch.float64, pin_memory=device.type == "cuda")
        ids = [id(parameter) for parameter, _ in pairs]
        if self._static is None or self._static.device != device or list(self._rows) != ids:
            self._static = torch.empty_like(numbers, device=device, pin_memory=False)
            self._rows = dict(zip(ids, self._static.unbind(), strict=True))
        self._static.copy_(numbers, non_blocking=True)

    @abstractmethod
    def _advance(self, parameter: nn.Parameter, group: dict[str, Any]) -> Sequence[float]:
        """Move what the host knows of a parameter on by a step; returns the step's numbers."""

    def _numbers(self, parameter: nn.Parameter) -> Tensor:
        """Put what `_advance` returned on the parameter's device, as float64."""
        assert self._static is not None, "`prepare` comes before `step`"
        return self._rows[id(parameter)]
