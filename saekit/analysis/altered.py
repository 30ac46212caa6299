"""The language model of an evaluation, as it is and with something in place of activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saekit.activations import splice, start_after
from saekit.activations.hookpoints import Hookpoint, find_blocks
from saekit.activations.pair import names_in
from saekit.activations.splice import Predict, Replace
from saekit.activations.tap import without_cache
from saekit.analysis.sums import CHANGES, SKIP

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Clean(NamedTuple):
    """What a language model gives for a batch when nothing is replaced."""

    logits: Tensor
    """`[B, T, V]`."""
    starts: dict[str, Tensor]
    """Outputs of the blocks behind which the model can be started."""


class Altered:
    """Runs a language model, clean or with replaced activations.

    Args:
        model: With a head.
        hookpoints: Whose activations are looked at; of two models only its own are.
        start_anywhere: Whether blocks before what is replaced may be left out, where that was seen to give the same.
        prefix: What begins the names of its hookpoints, see `saekit.activations.pair.Models`.
    """

    def __init__(
        self, model: PreTrainedModel, hookpoints: Sequence[str], start_anywhere: bool, prefix: str = ""
    ) -> None:
        self.model, self.prefix = model, prefix
        own = names_in(prefix, hookpoints)
        self.hookpoints = [f"{prefix}{name}" for name in own]
        starts = starts_of(model, own) if start_anywhere else {}
        self._starts = {f"{prefix}{name}": f"{prefix}{start}" for name, start in starts.items()}
        self._no_cache = without_cache(model)
        self._can_start_after: dict[str, bool] = {}
        """By block: whether the model can be run from its output on only."""

    def clean(self, inputs: Tensor) -> tuple[Clean, dict[str, Tensor]]:
        """Run the model as it is; returns also each hookpoint's activations `[B, T, D]`, which the caller can drop."""
        seen: dict[str, Tensor] = {}

        def watch(name: str) -> Replace:
            def look(acts: Tensor) -> Tensor:
                # A copy, where the model may go on to change the tensor in place.
                seen[name] = acts if Hookpoint(name, 0).is_block else acts.clone()
                return acts

            return look

        starts = set(self._starts.values())
        logits = self.logits(inputs, {name: watch(name) for name in {*self.hookpoints, *starts}})
        return Clean(logits, {name: seen[name] for name in starts}), {name: seen[name] for name in self.hookpoints}

    def logits(
        self, inputs: Tensor, replacements: Mapping[str, Replace | Predict], excluded: Tensor | None = None
    ) -> Tensor:
        """Logits `[B, T, V]` with replaced activations."""
        own = {name.removeprefix(self.prefix): replace for name, replace in replacements.items()}
        with splice(self.model, own, excluded):
            return self.model(input_ids=inputs, **self._no_cache).logits

    def logits_from(self, clean: Clean, new: Mapping[str, Replace], inputs: Tensor) -> Tensor:
        """Logits `[B, T, V]` with replaced activations; blocks before them do not run, if that makes no difference.

        Args:
            clean: What the model gave for the same inputs.
            new: By hookpoint, in model order.
            inputs: Of the model.
        """
        first = next(iter(new))
        start = self._starts.get(first)
        if start is None or not self._starts_alike(start, clean, inputs):
            return self.logits(inputs, new)
        acts, rest = clean.starts[start], dict(new)
        if start == first:
            acts = rest.pop(first)(acts).to(acts)
        with start_after(self.model, start.removeprefix(self.prefix), acts):
            return self.logits(inputs, rest)

    def _starts_alike(self, start: str, clean: Clean, inputs: Tensor) -> bool:
        """Find out, once, whether the model gives the same from a block's own output on; if not, it is run as a whole.

        It may miss something that the idle blocks would have left.
        """
        if start not in self._can_start_after:
            try:
                with start_after(self.model, start.removeprefix(self.prefix), clean.starts[start]):
                    same = torch.equal(self.logits(inputs, {}), clean.logits)
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                same = False
            self._can_start_after[start] = same
        return self._can_start_after[start]


def starts_of(model: PreTrainedModel, hookpoints: Iterable[str]) -> dict[str, str]:
    """Return the block behind whose output a model can be started to replace a hookpoint, where there is one.

    That is the block itself for its output, and the one before it for what is inside it.
    """
    blocks = find_blocks(model)
    layers = {blocks.hookpoint(layer): layer for layer in range(len(blocks.modules))}
    found = {}
    for name in hookpoints:
        module = Hookpoint(name, 0).module
        inside = [layer for block, layer in layers.items() if f"{module}.".startswith(f"{block}.")]
        if name in layers:
            found[name] = name
        elif inside and inside[0]:
            found[name] = blocks.hookpoint(inside[0] - 1)
    return found


def joined(parts: Iterable[Tensor]) -> Tensor:
    """One hookpoint behind the other, in float32."""
    each = [part.float() for part in parts]
    return each[0] if len(each) == 1 else torch.cat(each, -1)


def where(counted: Tensor, replace: Replace) -> Replace:
    """Replace only some tokens, bool `[B, T]`; the others keep their activations."""
    return lambda acts: torch.where(counted[..., None], replace(acts), acts)


def changes_of(
    written: Mapping[str, Tensor], recon: Tensor, mean_D: Tensor, skip: Tensor | None
) -> dict[str, dict[str, Replace]]:
    """By hookpoint and by what is put in its place; the names are `CHANGES`, and `SKIP` where there is one."""
    widths = [acts.shape[-1] for acts in written.values()]
    parts = zip(written, recon.split(widths, -1), mean_D.split(widths), strict=True)
    return {name: _ways(part, part_mean_D, skip) for name, part, part_mean_D in parts}


def _ways(recon: Tensor, mean_D: Tensor, skip: Tensor | None) -> dict[str, Replace]:
    ways: tuple[Replace, ...] = (lambda acts: recon, lambda acts: mean_D.expand(acts.shape), torch.zeros_like)
    found = dict(zip(CHANGES, ways, strict=True))
    if skip is not None:
        found[SKIP] = lambda acts: skip
    return found
