"""Adam for SAEs: projects and renormalizes decoder rows in the same pass, with moments in 32 or 16 bits."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from saekit.sae.kernels import Kernels, update_kernels
from saekit.sae.kernels.eager import adam_numbers
from saekit.sae.kernels.row_sums import RowSums, defer_gradient
from saekit.training.prepared import PreparedOptimizer

BETA1 = 0.9
EPS = 1e-8


class SaeAdam(PreparedOptimizer):
    """Adam (Kingma and Ba 2015) that updates parameters with an SAE's kernels.

    Args:
        params: The parameters to train.
        lr: Learning rate.
        betas: Decay per step of the first and the second moment.
        kernels: Their `adam_` updates the parameters on devices that they support (`update_kernels`).
        unit_rows: The matrices among `params` whose rows have norm 1. Their gradients are projected before the step,
            and their rows are scaled to norm 1 after it.
        moments_dtype: Type in which the moments are stored; they are updated in float32.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        kernels: Kernels,
        unit_rows: Collection[nn.Parameter] = (),
        moments_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": EPS})
        self.kernels = kernels
        self.moments_dtype = moments_dtype
        self._unit_rows = {id(parameter) for parameter in unit_rows}
        self.deferred: dict[nn.Parameter, list[RowSums]] = {}
        """Rows by matrix; their sum is the matrix's deferred gradient."""

    def defer_gradients(self) -> None:
        """Defer the gradients of all matrices to the step, if the kernels can (`saekit.sae.kernels.row_sums`).

        A matrix's gradient is then the sum of its `.grad`, if it has one, and of its rows in `deferred`.
        """
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        self.deferred = {each: defer_gradient(each) for each in parameters if each.ndim == 2}

    def _advance(self, parameter: nn.Parameter, group: dict[str, Any]) -> tuple[float, ...]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, so reading it does not wait for a GPU
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.moments_dtype)
        state["step"] += 1
        return adam_numbers(int(state["step"]), float(group["lr"]), *group["betas"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, with the numbers of `prepare`. The gradients are consumed."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                gradient = self._gradient(parameter)
                if gradient is None:
                    continue
                numbers, state = self._numbers(parameter), self.state[parameter]
                update_kernels(self.kernels, parameter.device).adam_(
                    parameter,
                    gradient,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    numbers=numbers,
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    unit_rows=id(parameter) in self._unit_rows,
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, deferred ones too."""
        super().zero_grad(set_to_none)
        for sums in self.deferred.values():
            sums.clear()

    def _gradient(self, parameter: nn.Parameter) -> Tensor | RowSums | None:
        """Return the whole gradient: its deferred rows if they are all of it, otherwise one dense tensor."""
        deferred = self.deferred.get(parameter, [])
        if len(deferred) == 1 and parameter.grad is None:
            return deferred[0]
        for sums in deferred:
            dense = update_kernels(self.kernels, parameter.device).sum_rows(sums)
            parameter.grad = dense if parameter.grad is None else parameter.grad.add_(dense)
        deferred.clear()
        return parameter.grad

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state as torch does, but keep `moments_dtype`: torch casts all state to the parameter's type."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in {"exp_avg", "exp_avg_sq"} & state.keys():  # no moments before the first counted step
                state[key] = state[key].to(self.moments_dtype)
