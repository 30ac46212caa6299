"""Sign descent with schedule-free averaging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saekit.training.prepared import PreparedOptimizer


class ScheduleFreeSignum(PreparedOptimizer):
    """Schedule-free sign descent (Defazio et al. 2024, "The Road Less Scheduled", arXiv 2405.15682, equations 3-5).

    It has three sequences: `z` takes the steps, `x` is the weighted mean of `z`, and gradients are taken at `y` between
    the two:

        z' = z − lr · sign(∇f(y))
        x' = (1 − c) x + c z'        c = lr² / Σ lr²
        y' = (1 − β) z' + β x'

    The parameters hold `y`. `average` computes `x`, the weights to use and to save, from `y` and `z`. The averaging
    replaces momentum and makes a decay of the learning rate unnecessary.

    Args:
        params: Parameters of float type, or groups of them, as torch takes them.
        lr: Learning rate.
        beta: β, the weight of the mean `x` in `y`.
    """

    def __init__(self, params: Any, lr: float, beta: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    def _advance(self, parameter: nn.Parameter, group: dict[str, Any]) -> tuple[float, ...]:
        """Advance `Σ lr²` and return the learning rate and `c`."""
        lr, state = float(group["lr"]), self.state[parameter]
        if not state:
            state["z"] = parameter.clone()
            state["weight_sum"] = 0.0
        state["weight_sum"] += lr**2
        return lr, lr**2 / state["weight_sum"] if state["weight_sum"] else 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the prepared step. Parameters without a gradient do not move."""
        for group in self.param_groups:
            beta = group["beta"]
            for y in group["params"]:
                if y.grad is None:
                    continue
                lr, c = self._numbers(y).to(y.dtype)
                z = self.state[y]["z"]
                x = self._mean(y, z, beta)
                z -= y.grad.sign().mul_(lr)
                x.lerp_(z, c)
                torch.lerp(z, x, beta, out=y)

    def average(self, parameter: nn.Parameter) -> Tensor:
        """Return `x`, the weights to use, for a parameter that holds `y`."""
        state = self.state[parameter]
        if not state:
            return parameter.detach()
        beta = next(group["beta"] for group in self.param_groups if any(p is parameter for p in group["params"]))
        return self._mean(parameter.detach(), state["z"], beta)

    @staticmethod
    def _mean(y: Tensor, z: Tensor, beta: float) -> Tensor:
        """Return `x = z + (y − z) / β`."""
        return torch.lerp(z, y, 1 / beta)
