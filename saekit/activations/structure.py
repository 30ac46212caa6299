"""Measure the inputs and outputs of a language model's modules, in a run without weights on the meta device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saekit.activations.hookpoints import Blocks, find_blocks
from saekit.activations.observed import RESIDUAL, Attention, Sums
from saekit.activations.tap import first_argument, residual, without_cache
from saekit.errors import first_line
from saekit.sae.storage import IN

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BATCH, TOKENS = 3, 7
"""Sizes of the measured run. A tensor whose first sizes are these has one row per token."""
NO_TENSOR_OF_TOKENS = ", not [batch, tokens, width]"
"""The end of a reason, after a shape."""
IS_LIST = "is a list of modules"
"""The reason for modules that contain others and do not run themselves."""


@dataclass(frozen=True)
class Reading:
    """One side of a module, its input or its output, in a forward pass."""

    name: str
    """The hookpoint's name."""
    width: int | None
    """D, if it is a tensor `[batch, tokens, D]` that occurs once in a forward pass, otherwise None."""
    reason: str | None
    """Why it is not a hookpoint. None if it is one."""
    order: int
    """The position among all inputs and outputs in the order of the forward pass. -1 if the module does not run."""


@dataclass(frozen=True)
class Branch:
    """A term that a block adds to the residual stream."""

    block: int
    module: str
    """The path of the outermost module that outputs it, ignoring a norm after it."""
    attends: bool
    """Whether the module contains attention."""
    is_mlp: bool
    """Whether the module reads only a tensor of the residual stream's width, and has two matrices or more."""


@dataclass(frozen=True)
class Structure:
    """A language model's modules, and how its blocks use them."""

    prefix: str
    """The path of the list of blocks, as in `Blocks`."""
    depth: int
    """The number of blocks."""
    width: int
    """The width of the residual stream."""
    readings: Mapping[str, Reading]
    """Both sides of every module of the base model, by hookpoint's name, in the order of the modules."""
    kinds: Mapping[str, str]
    """The name of each module's class, by path."""
    branches: tuple[Branch, ...]
    """The branches of all blocks, in order. Empty if a norm follows every sum, as in BERT."""
    writers: frozenset[str]
    """Names of the hookpoints whose activations are added to the residual stream, possibly times a constant."""

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a hookpoint belongs to. None outside the blocks."""
        if not name.startswith(f"{self.prefix}."):
            return None
        return int(name.removesuffix(IN)[len(self.prefix) + 1 :].partition(".")[0])


def measure(model_class: type[PreTrainedModel] | None, config: PretrainedConfig) -> Structure:
    """Run a model without weights on a few tokens, and record each module's input and output.

    Args:
        model_class: The base model's class. By default the one that `AutoModel` chooses for the config.
        config: The model's config.

    Raises:
        UserError: See `find_blocks`.
    """
    return _measure(_Key(model_class, config.to_json_string(use_diff=False), config))


@dataclass(frozen=True)
class _Key:
    model_class: type[PreTrainedModel] | None
    text: str
    config: PretrainedConfig = field(compare=False)


@lru_cache(maxsize=4)
def _measure(key: _Key) -> Structure:
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(key.config) if key.model_class is None else key.model_class(key.config)
    base = model.to(torch.bfloat16).eval().base_model  # some operations support no other type on the meta device
    return _Run(base, find_blocks(base)).structure()


class _Run:
    """One observed forward pass."""

    def __init__(self, base: PreTrainedModel, blocks: Blocks) -> None:
        self.base, self.blocks = base, blocks
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in base.named_modules(remove_duplicate=False):
            if name:
                self.names.setdefault(module, []).append(name)
        self.seen: dict[str, list[tuple[Any, int]]] = {}
        self.attends: set[str] = set()
        self.stack: list[str] = []
        self.sums = Sums()
        self.events = 0
        self.block_terms: dict[int, list[int]] = {}
        """The terms that each block adds to the residual stream, by block."""
        self.block_numbers = {f"{blocks.prefix}.{number}": number for number in range(len(blocks.modules))}
        self.failed = ""

    def structure(self) -> Structure:
        """Run the forward pass, and derive the structure from what was recorded."""
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after, with_kwargs=True))
        input_ids = torch.zeros(BATCH, TOKENS, dtype=torch.int64, device="meta")
        try:
            with torch.no_grad(), self.sums, Attention(self.attends, self.stack):
                self.base(input_ids=input_ids, **without_cache(self.base))
        except Exception as error:  # noqa: BLE001  # a model's code can raise anything on the meta device
            self.failed = first_line(error)
        for handle in handles:
            handle.remove()
        readings = {
            name + side: self._reading(name + side)
            for names in self.names.values()
            for name in names
            for side in (IN, "")
        }
        width = readings[f"{self.blocks.prefix}.0"].width or 0
        branches, writers = self._branches(readings, width)
        kinds = {name: type(module).__name__ for module, names in self.names.items() for name in names}
        return Structure(
            self.blocks.prefix, len(self.blocks.modules), width, readings, kinds, tuple(branches), frozenset(writers)
        )

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self.names[module][0]
        self.stack.append(name)
        given = first_argument(module, args, kwargs)
        self._note(name + IN, given)
        if name in self.block_numbers and isinstance(given, Tensor):
            self.sums.record_stream(given)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self.names[module][0]
        self.stack.pop()
        try:
            given: Any = residual(output)
        except ValueError:  # the output has no tensor
            given = None
        self._note(name, given)
        if not isinstance(given, Tensor):
            return
        if name not in self.block_numbers:
            self.sums.record_output(name, given, self.seen[name + IN][-1][0])
        elif RESIDUAL in self.sums.terms_of(given):
            self.block_terms[self.block_numbers[name]] = [
                term for term in self.sums.terms_of(given) if term != RESIDUAL
            ]

    def _note(self, name: str, given: Any) -> None:
        self.seen.setdefault(name, []).append((given, self.events))
        self.events += 1

    def _reading(self, name: str) -> Reading:
        module = self.base.get_submodule(name.removesuffix(IN))
        first = self.names[module][0] + (IN if name.endswith(IN) else "")
        seen = self.seen.get(first, [])
        if not seen:
            ran = f"cannot be run without weights ({self.failed})" if self.failed else "does not run for text"
            is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
            return Reading(name, None, IS_LIST if is_list else ran, -1)
        given, order = seen[0]
        if len(seen) > 1:
            return Reading(name, None, f"runs {len(seen)} times in a forward pass", order)
        side = "reads" if name.endswith(IN) else "outputs"
        if not isinstance(given, Tensor):
            return Reading(name, None, f"{side} no tensor", order)
        if not given.is_floating_point():
            return Reading(name, None, f"{side} integers", order)
        if given.ndim != 3 or given.shape[:2] != (BATCH, TOKENS):
            known = {BATCH: "batch", TOKENS: "tokens", BATCH * TOKENS: "batch·tokens"}
            sizes = [known.get(size, str(size)) if place < 2 else str(size) for place, size in enumerate(given.shape)]
            return Reading(name, None, f"{side} [{', '.join(sizes)}]{NO_TENSOR_OF_TOKENS}", order)
        return Reading(name, given.shape[2], None, order)

    def _branches(self, readings: Mapping[str, Reading], width: int) -> tuple[list[Branch], list[str]]:
        branches, writers = [], []
        for block, terms in sorted(self.block_terms.items()):
            for term in terms:
                names = self.sums.producers.get(term, [])
                writers += [name for name in names if readings[name].width == width]
                module = self._module_of(names)
                if module is None:
                    continue
                is_mlp = (
                    readings[module].width == readings[module + IN].width == width
                    and module not in self.attends
                    and self._matrices(module) > 1
                    and len(inspect.signature(self.base.get_submodule(module).forward).parameters) == 1
                )
                branches.append(Branch(block, module, module in self.attends, is_mlp))
        return branches, writers

    def _module_of(self, producers: Sequence[str]) -> str | None:
        """Return the outermost module that outputs a term, ignoring dropouts around it and a norm after it."""
        module = next((name for name in reversed(producers) if self._matrices(name)), None)
        return module or next(filter(None, (self.sums.read_from.get(name) for name in producers)), None)

    def _matrices(self, name: str) -> int:
        return sum(parameter.ndim > 1 for parameter in self.base.get_submodule(name).parameters())
