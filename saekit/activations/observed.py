"""Watches a forward pass on the meta device: which modules add to the residual stream, and which attend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

RESIDUAL = -1
"""Stands for the residual stream among the terms of a sum."""
SAME_DIRECTION = frozenset(
    {"_to_copy", "clone", "view", "_unsafe_view", "alias", "detach", "mul", "div", "mul_", "div_", "contiguous"}
)
"""Operations whose result points in the direction of their first argument, if the others are numbers."""


class Sums(TorchDispatchMode):
    """Notices of which terms each tensor is the sum, and which modules give the terms."""

    def __init__(self) -> None:
        super().__init__()
        self._terms: dict[int, dict[int, None]] = {}
        self._kept: list[Tensor] = []
        """So that no other tensor gets a number that is known already; on the meta device they take no memory."""
        self.givers: dict[int, list[str]] = {}
        """Modules by the term that they give, the innermost first."""
        self.read_from: dict[str, str] = {}
        """The outermost module that gave what a module reads."""

    def terms_of(self, tensor: Tensor) -> dict[int, None]:
        """Return the numbers of the tensors that it is the sum of, in order: at least its own."""
        return self._terms.get(id(tensor), {id(tensor): None})

    def begin(self, tensor: Tensor) -> None:
        """Take a tensor for the residual stream as it is before a block."""
        self._keep(tensor, {RESIDUAL: None})

    def gives(self, name: str, given: Tensor, read: Any) -> None:
        """Note a module's output; a sum that is made inside it is one term outside."""
        terms = self.terms_of(given)
        if RESIDUAL in terms:
            return
        if len(terms) > 1:
            terms = {id(given): None}
        (term,) = terms
        if isinstance(read, Tensor) and len(source := list(self.terms_of(read))) == 1 and source[0] != term:
            self.read_from[name] = next(reversed(self.givers.get(source[0], [])), "")
        self._keep(given, terms)
        self.givers.setdefault(term, []).append(name)

    def _keep(self, tensor: Tensor, terms: dict[int, None]) -> None:
        self._kept.append(tensor)
        self._terms[id(tensor)] = terms

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what its result is the sum of."""
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            return out
        self._kept += [each for each in (out, *args) if isinstance(each, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        tensors = [each for each in args if isinstance(each, Tensor) and each.ndim]
        if name in ("add", "add_") and len(tensors) == 2:
            self._terms[id(out)] = {**self.terms_of(tensors[0]), **self.terms_of(tensors[1])}
        elif name in SAME_DIRECTION and len(tensors) == 1:
            self._terms[id(out)] = self.terms_of(tensors[0])
        return out


def run_without_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation of a `TorchFunctionMode`, or on the meta device what stands in for one that asks for numbers.

    Attention takes the memory of its result, as fused kernels do: torch would choose plain matmuls there, which make
    the scores of all pairs of tokens.
    """
    if func is torch.nn.functional.scaled_dot_product_attention:
        query = args[0] if args else kwargs["query"]
        value = args[2] if len(args) > 2 else kwargs["value"]
        return query.new_empty(*query.shape[:-1], value.shape[-1])
    if func in (Tensor.nonzero, torch.nonzero) and args[0].is_meta:
        return args[0].new_empty(0, args[0].ndim, dtype=torch.int64)  # no token is routed to a single expert
    if func is Tensor.__bool__ and args[0].is_meta:
        return True  # models ask whether no token is masked, and whether a row is one sequence: so it is
    return func(*args, **kwargs)


class Attention(TorchFunctionMode):
    """Notices which modules attend, see also `run_without_numbers`.

    Args:
        attends: Names of those modules; they are added to it.
        inside: The modules that are at work, the outermost first.
    """

    def __init__(self, attends: set[str], inside: list[str]) -> None:
        super().__init__()
        self._attends, self._inside = attends, inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or what stands in for it."""
        in_softmax = func in (torch.nn.functional.softmax, torch.softmax, Tensor.softmax) and args and args[0].ndim == 4
        if in_softmax or func is torch.nn.functional.scaled_dot_product_attention:
            self._attends.update(self._inside)
        return run_without_numbers(func, args, kwargs or {})
