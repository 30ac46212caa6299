"""Observe a forward pass on the meta device: which modules add to the residual stream, and which attend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

RESIDUAL = -1
"""The residual stream, as a term of a sum."""
SAME_DIRECTION = frozenset(
    {"_to_copy", "clone", "view", "_unsafe_view", "alias", "detach", "mul", "div", "mul_", "div_", "contiguous"}
)
"""Operations whose result has the direction of their first argument, if the other arguments are numbers."""


class Sums(TorchDispatchMode):
    """Records which terms each tensor is the sum of, and which modules output the terms.

    A term is the `id` of a tensor, or `RESIDUAL`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._terms: dict[int, dict[int, None]] = {}
        self._kept: list[Tensor] = []
        """All tensors, kept alive so that no id is used twice. On the meta device they take no memory."""
        self.producers: dict[int, list[str]] = {}
        """The modules that output a term, by term, the innermost first."""
        self.read_from: dict[str, str] = {}
        """By module: the outermost module that outputs its input."""

    def terms_of(self, tensor: Tensor) -> dict[int, None]:
        """Return the terms that a tensor is the sum of, in order. A tensor that is no sum is its own term."""
        return self._terms.get(id(tensor), {id(tensor): None})

    def record_stream(self, tensor: Tensor) -> None:
        """Record a tensor as the residual stream before a block."""
        self._keep(tensor, {RESIDUAL: None})

    def record_output(self, name: str, given: Tensor, read: Any) -> None:
        """Record a module's output. A sum computed inside the module is one term outside it."""
        terms = self.terms_of(given)
        if RESIDUAL in terms:
            return
        if len(terms) > 1:
            terms = {id(given): None}
        (term,) = terms
        if isinstance(read, Tensor) and len(source := list(self.terms_of(read))) == 1 and source[0] != term:
            self.read_from[name] = next(reversed(self.producers.get(source[0], [])), "")
        self._keep(given, terms)
        self.producers.setdefault(term, []).append(name)

    def _keep(self, tensor: Tensor, terms: dict[int, None]) -> None:
        self._kept.append(tensor)
        self._terms[id(tensor)] = terms

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record the terms of its result."""
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
    """Run an operation of a `TorchFunctionMode`, or a substitute if it reads values, which the meta device lacks.

    The substitute for attention allocates only the result, as fused kernels do. On the meta device torch would use
    plain matmuls instead, which allocate the scores of all pairs of tokens.
    """
    if func is torch.nn.functional.scaled_dot_product_attention:
        query = args[0] if args else kwargs["query"]
        value = args[2] if len(args) > 2 else kwargs["value"]
        return query.new_empty(*query.shape[:-1], value.shape[-1])
    if func in (Tensor.nonzero, torch.nonzero) and args[0].is_meta:
        return args[0].new_empty(0, args[0].ndim, dtype=torch.int64)  # as if no token were routed to an expert
    if func is Tensor.__bool__ and args[0].is_meta:
        return True  # models ask whether no token is masked, and whether a row is one sequence: both are true
    return func(*args, **kwargs)


class Attention(TorchFunctionMode):
    """Records which modules compute attention. Runs operations with `run_without_numbers`.

    Args:
        attends: The set to add the names of these modules to.
        inside: The names of the modules that are running, the outermost first.
    """

    def __init__(self, attends: set[str], inside: list[str]) -> None:
        super().__init__()
        self._attends, self._inside = attends, inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation or its substitute, and record the running modules if it is attention."""
        in_softmax = func in (torch.nn.functional.softmax, torch.softmax, Tensor.softmax) and args and args[0].ndim == 4
        if in_softmax or func is torch.nn.functional.scaled_dot_product_attention:
            self._attends.update(self._inside)
        return run_without_numbers(func, args, kwargs or {})
