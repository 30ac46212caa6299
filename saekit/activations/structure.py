"""What the modules of a language model are given and give, measured in a run without weights on the meta device."""

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
"""Of the measured run: a tensor of these sizes has one row for every token."""
NO_TENSOR_OF_TOKENS = ", not [batch, tokens, width]"
"""The end of a reason, behind a shape."""
IS_LIST = "is a list of modules"
"""The reason of what holds others and is not run itself."""


@dataclass(frozen=True)
class Reading:
    """One side of a module in a forward pass."""

    name: str
    """The hookpoint's."""
    width: int | None
    """D, if it is a tensor `[batch, tokens, D]` of every token, once in a forward pass."""
    reason: str | None
    """Why it is no hookpoint; None if it is one."""
    order: int
    """When it is there: input and output of modules are numbered as they come; -1 if it never is."""


@dataclass(frozen=True)
class Branch:
    """A term that a block adds to the residual stream."""

    block: int
    module: str
    """Path of the outermost module that gives it, apart from a norm behind it."""
    attends: bool
    """Whether it holds attention."""
    is_mlp: bool
    """Whether it reads nothing but a tensor of the residual stream's width and has two matrices or more."""


@dataclass(frozen=True)
class Structure:
    """A language model's modules, and how its blocks use them."""

    prefix: str
    """As in `Blocks`."""
    depth: int
    """Blocks."""
    width: int
    """Of the residual stream."""
    readings: Mapping[str, Reading]
    """By hookpoint's name, in the order of the modules; both sides of every module of the base model."""
    kinds: Mapping[str, str]
    """Class name by path of the module."""
    branches: tuple[Branch, ...]
    """Of all blocks, in their order; none where a norm comes behind every sum, as in BERT."""
    writers: frozenset[str]
    """Names of the hookpoints whose activations are added to the residual stream as they are, or times a number."""

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a hookpoint belongs to; None outside the blocks."""
        if not name.startswith(f"{self.prefix}."):
            return None
        return int(name.removesuffix(IN)[len(self.prefix) + 1 :].partition(".")[0])


def measure(model_class: type[PreTrainedModel] | None, config: PretrainedConfig) -> Structure:
    """Run a model without weights for a few tokens, and look at what each module is given and gives.

    Args:
        model_class: The base model's; by default what `AutoModel` makes of the config.
        config: The model's.

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
    base = model.to(torch.bfloat16).eval().base_model  # some operations know no other type on the meta device
    return _Run(base, find_blocks(base)).structure()


class _Run:
    """One forward pass under observation."""

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
        self.found: dict[int, list[int]] = {}
        """By block: the terms that it adds to the residual stream."""
        self.own = {f"{blocks.prefix}.{number}": number for number in range(len(blocks.modules))}
        self.failed = ""

    def structure(self) -> Structure:
        """Run, and make sense of it."""
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(module.register_forward_hook(self._behind, with_kwargs=True))
        input_ids = torch.zeros(BATCH, TOKENS, dtype=torch.int64, device="meta")
        try:
            with torch.no_grad(), self.sums, Attention(self.attends, self.stack):
                self.base(input_ids=input_ids, **without_cache(self.base))
        except Exception as error:  # noqa: BLE001  # whatever a model's code does without numbers
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
        if name in self.own and isinstance(given, Tensor):
            self.sums.begin(given)

    def _behind(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self.names[module][0]
        self.stack.pop()
        try:
            given: Any = residual(output)
        except ValueError:  # there is no tensor in it
            given = None
        self._note(name, given)
        if not isinstance(given, Tensor):
            return
        if name not in self.own:
            self.sums.gives(name, given, self.seen[name + IN][-1][0])
        elif RESIDUAL in self.sums.terms_of(given):
            self.found[self.own[name]] = [term for term in self.sums.terms_of(given) if term != RESIDUAL]

    def _note(self, name: str, given: Any) -> None:
        self.seen.setdefault(name, []).append((given, self.events))
        self.events += 1

    def _reading(self, name: str) -> Reading:
        module = self.base.get_submodule(name.removesuffix(IN))
        first = self.names[module][0] + (IN if name.endswith(IN) else "")
        seen = self.seen.get(first, [])
        if not seen:
            ran = "is not run for text" if not self.failed else f"could not be run without weights ({self.failed})"
            is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
            return Reading(name, None, IS_LIST if is_list else ran, -1)
        given, order = seen[0]
        if len(seen) > 1:
            return Reading(name, None, f"runs {len(seen)} times in a forward pass", order)
        side = "reads" if name.endswith(IN) else "gives"
        if not isinstance(given, Tensor):
            return Reading(name, None, f"{side} no tensor", order)
        if not given.is_floating_point():
            return Reading(name, None, f"{side} whole numbers", order)
        if given.ndim != 3 or given.shape[:2] != (BATCH, TOKENS):
            known = {BATCH: "batch", TOKENS: "tokens", BATCH * TOKENS: "batch·tokens"}
            sizes = [known.get(size, str(size)) if place < 2 else str(size) for place, size in enumerate(given.shape)]
            return Reading(name, None, f"{side} [{', '.join(sizes)}]{NO_TENSOR_OF_TOKENS}", order)
        return Reading(name, given.shape[2], None, order)

    def _branches(self, readings: Mapping[str, Reading], width: int) -> tuple[list[Branch], list[str]]:
        branches, writers = [], []
        for block, terms in sorted(self.found.items()):
            for term in terms:
                names = self.sums.givers.get(term, [])
                writers += [name for name in names if readings[name].width == width]
                module = self._computes(names)
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

    def _computes(self, givers: Sequence[str]) -> str | None:
        """Return the outermost of the modules that give a term, without dropouts around it or a norm behind it."""
        module = next((name for name in reversed(givers) if self._matrices(name)), None)
        return module or next(filter(None, (self.sums.read_from.get(name) for name in givers)), None)

    def _matrices(self, name: str) -> int:
        return sum(parameter.ndim > 1 for parameter in self.base.get_submodule(name).parameters())
