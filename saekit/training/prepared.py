"""Optimizers whose step is a fixed graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PreparedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that takes a step in two parts: `prepare()` on the host, then `step()` on the device.

    `prepare` counts the step and computes every number that changes from step to step. It writes them to one tensor
    with a fixed address. `step` reads tensors only: it uses no changing Python number, no value that the host waits
    for, and no shape that depends on data. A GPU may therefore record `step` once and replay it.

    `prepare` counts the step for all parameters, so each must have a gradient when `step` runs.
    """

    _static: Tensor | None = None
    _rows: dict[int, Tensor]

    @torch.no_grad()
    def prepare(self) -> None:
        """Prepare the next `step` at the learning rates of the groups, without waiting for a GPU."""
        pairs = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        if not pairs:
            return
        rows, device = [self._advance(*each) for each in pairs], pairs[0][0].device
        # The pinned memory's allocator does not reuse it before the copy is done, so the next step cannot overwrite it.
        numbers = torch.tensor(rows, dtype=torch.float64, pin_memory=device.type == "cuda")
        ids = [id(parameter) for parameter, _ in pairs]
        if self._static is None or self._static.device != device or list(self._rows) != ids:
            self._static = torch.empty_like(numbers, device=device, pin_memory=False)
            self._rows = dict(zip(ids, self._static.unbind(), strict=True))
        self._static.copy_(numbers, non_blocking=True)

    @abstractmethod
    def _advance(self, parameter: nn.Parameter, group: dict[str, Any]) -> Sequence[float]:
        """Advance a parameter's state on the host by one step, and return the numbers of that step."""

    def _numbers(self, parameter: nn.Parameter) -> Tensor:
        """Return what `_advance` returned for a parameter, as float64 on its device."""
        assert self._static is not None, "`prepare` comes before `step`"
        return self._rows[id(parameter)]
