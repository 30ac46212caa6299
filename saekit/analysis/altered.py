"""The language model of an evaluation, as it is and with something in the place of activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.activations import splice, start_behind
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.pair import names_in, tap_all
from saekit.activations.splice import Predict, Replace
from saekit.activations.tap import without_cache
from saekit.analysis.sums import CHANGES, SKIP

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Altered:
    """Runs a language model, clean or with replaced activations.

    Args:
        model: With a head, but for `read`.
        hookpoints: Whose activations are looked at; of two models only its own are.
        start_anywhere: Whether blocks whose output is replaced may be left out, where that was seen to give the same.
        prefix: What begins the names of its hookpoints, see `saekit.activations.pair.Models`.
    """

    def __init__(
        self, model: PreTrainedModel, hookpoints: Sequence[str], start_anywhere: bool, prefix: str = ""
    ) -> None:
        self.model, self.prefix, self.start_anywhere = model, prefix, start_anywhere
        self.hookpoints = [f"{prefix}{name}" for name in names_in(prefix, hookpoints)]
        self._blocks = {name for name in self.hookpoints if Hookpoint(name, 0).is_block}
        self._no_cache = without_cache(model)
        self._can_start_behind: dict[str, bool] = {}
        """By hookpoint: whether a model with it replaced can be run from there on only."""

    def read(self, inputs: Tensor) -> dict[str, Tensor]:
        """Each hookpoint's activations `[B, T, D]`."""
        with tap_all({self.prefix: self.model}, self.hookpoints) as read:
            return read(inputs)

    def clean(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `[B, T, V]` and each hookpoint's activations `[B, T, D]`, in one pass."""
        seen: dict[str, Tensor] = {}

        def watch(name: str) -> Replace:
            def look(acts: Tensor) -> Tensor:
                # A copy, where the model may go on to change the tensor in place.
                seen[name] = acts if name in self._blocks else acts.clone()
                return acts

            return look

        return self.logits(inputs, {name: watch(name) for name in self.hookpoints}), seen

    def logits(
        self, inputs: Tensor, replacements: Mapping[str, Replace | Predict], excluded: Tensor | None = None
    ) -> Tensor:
        """Logits with replaced activations."""
        own = {name.removeprefix(self.prefix): replace for name, replace in replacements.items()}
        with splice(self.model, own, excluded):
            return self.model(input_ids=inputs, **self._no_cache).logits

    def logits_behind(self, hookpoint: str, new: Tensor, inputs: Tensor) -> Tensor:
        """Logits with these activations at a hookpoint."""
        if not self._can_start_behind.get(hookpoint, False):
            return self.logits(inputs, {hookpoint: lambda _: new})
        with start_behind(self.model, hookpoint.removeprefix(self.prefix), new):
            return self.model(input_ids=inputs, **self._no_cache).logits

    def try_starting_behind(self, name: str, acts: Tensor, inputs: Tensor, logits: Tensor) -> None:
        """Find out, once, whether the model gives the same from a block's own output on; if not, it is run as a whole.

        Args:
            name: The hookpoint.
            acts: What it gives for `inputs`.
            inputs: Of the model.
            logits: Of the clean model.
        """
        if name in self._can_start_behind or name not in self._blocks or not self.start_anywhere:
            return
        try:
            with start_behind(self.model, name.removeprefix(self.prefix), acts):
                again = self.model(input_ids=inputs, **self._no_cache).logits
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            self._can_start_behind[name] = False  # it misses something that the idle blocks would have left
            return
        self._can_start_behind[name] = torch.equal(again, logits)


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
