"""Run the language model of an evaluation, clean or with replaced activations."""

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
    """A language model's results for a batch without replacements."""

    logits: Tensor
    """`[B, T, V]`."""
    starts: dict[str, Tensor]
    """Outputs of the blocks after which the model can be started."""


class Altered:
    """Runs a language model, clean or with replaced activations.

    Args:
        model: The language model, with its head.
        hookpoints: The hookpoints to read. Those of another model are ignored.
        start_anywhere: Whether blocks before a replacement may be skipped, if a check shows that the result is the
            same.
        prefix: The prefix of its hookpoints' names. See `saekit.activations.pair.Models`.
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
        """Whether the model can be started after a block, by block."""

    def clean(self, inputs: Tensor) -> tuple[Clean, dict[str, Tensor]]:
        """Run the model without replacements, and also return each hookpoint's activations, `[B, T, D]`."""
        seen: dict[str, Tensor] = {}

        def watch(name: str) -> Replace:
            def look(acts: Tensor) -> Tensor:
                # Copy the tensor if the model may later change it in place.
                seen[name] = acts if Hookpoint(name, 0).is_block else acts.clone()
                return acts

            return look

        starts = set(self._starts.values())
        logits = self.logits(inputs, {name: watch(name) for name in {*self.hookpoints, *starts}})
        return Clean(logits, {name: seen[name] for name in starts}), {name: seen[name] for name in self.hookpoints}

    def logits(
        self, inputs: Tensor, replacements: Mapping[str, Replace | Predict], excluded: Tensor | None = None
    ) -> Tensor:
        """Compute the logits, `[B, T, V]`, with replaced activations."""
        own = {name.removeprefix(self.prefix): replace for name, replace in replacements.items()}
        with splice(self.model, own, excluded):
            return self.model(input_ids=inputs, **self._no_cache).logits

    def logits_from(self, clean: Clean, new: Mapping[str, Replace], inputs: Tensor) -> Tensor:
        """Compute the logits, `[B, T, V]`, with replaced activations. Skip earlier blocks if the result is the same.

        Args:
            clean: The clean model's results for the same inputs.
            new: Replacements by hookpoint, in model order.
            inputs: The model's input ids.
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
        """Check, once per block, that starting the model after a block gives the same logits as the whole model.

        It does not if later blocks need something else from the skipped blocks.
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
    """Return for each hookpoint the block after which a model can be started to replace it, if there is one.

    This is the block itself for a block's output, and the previous block for a hookpoint inside a block.
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
    """Concatenate the activations of several hookpoints, in float32."""
    each = [part.float() for part in parts]
    return each[0] if len(each) == 1 else torch.cat(each, -1)


def where(counted: Tensor, replace: Replace) -> Replace:
    """Restrict a replacement to counted tokens, bool `[B, T]`. The others keep their activations."""
    return lambda acts: torch.where(counted[..., None], replace(acts), acts)


def changes_of(
    written: Mapping[str, Tensor], recon: Tensor, mean_D: Tensor, skip: Tensor | None
) -> dict[str, dict[str, Replace]]:
    """Return replacements by hookpoint and kind. The kinds are `CHANGES`, and `SKIP` with a skip connection."""
    widths = [acts.shape[-1] for acts in written.values()]
    parts = zip(written, recon.split(widths, -1), mean_D.split(widths), strict=True)
    return {name: _ways(part, part_mean_D, skip) for name, part, part_mean_D in parts}


def _ways(recon: Tensor, mean_D: Tensor, skip: Tensor | None) -> dict[str, Replace]:
    ways: tuple[Replace, ...] = (lambda acts: recon, lambda acts: mean_D.expand(acts.shape), torch.zeros_like)
    found = dict(zip(CHANGES, ways, strict=True))
    if skip is not None:
        found[SKIP] = lambda acts: skip
    return found
