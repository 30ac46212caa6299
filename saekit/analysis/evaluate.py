"""The passes of an evaluation: what the SAEs reconstruct, and what grafting that into the language model costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from saekit.activations import splice, start_behind, tap
from saekit.activations.chosen import check_widths
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.splice import Replace
from saekit.activations.tap import without_cache
from saekit.analysis.results import (
    CHANGES,
    AnswerSums,
    Evaluation,
    Grafted,
    GraftSums,
    LayerResult,
    ReconstructionSums,
    ratio,
)
from saekit.analysis.subject import IGNORED, Subject, compare_answers
from saekit.errors import UserError

Progress = Callable[[int, int], None]
"""Told how many of how many passes over a batch are done."""


def evaluate(
    subject: Subject, progress: Progress = lambda done, of: None, *, start_anywhere: bool = True
) -> Evaluation:
    """Evaluate SAEs on a language model's activations, and the language model with them in it.

    Two passes over the sequences: one for each layer's mean activation, one for everything else. Each batch runs the
    clean model once, and with a head once for each layer and once for all layers together, spliced, mean-ablated and
    zero-ablated; for one layer, the blocks up to it need not run again.

    Args:
        subject: What is evaluated.
        progress: Told how far it is.
        start_anywhere: Whether those blocks may be left out, in a model that was seen to give the same without them;
            the result is the same either way.

    Raises:
        UserError: If an SAE does not fit the model, or every token is excluded.
    """
    return Evaluator(subject, start_anywhere)(progress)


class Evaluator:
    """Evaluates a subject as often as it is called, while its SAEs change.

    What does not depend on them, the means and the ablations, is computed in the first call only.

    Args:
        subject: What is evaluated.
        start_anywhere: See `evaluate`.

    Raises:
        UserError: If an SAE does not fit the model.
    """

    def __init__(self, subject: Subject, start_anywhere: bool = True) -> None:
        check_widths(subject.model, {name: sae.d_in for name, sae in subject.saes.items()})
        self.subject = subject
        self.start_anywhere = start_anywhere
        self.names = list(subject.saes)
        self._blocks = {name for name in self.names if Hookpoint(name, 0).is_block}
        self._no_cache = without_cache(subject.model)
        self._means: dict[str, Tensor] | None = None
        self._grafts: dict[str, GraftSums] | None = None
        """Of the last call; "" is all layers together."""
        self._done: Callable[[], None] = lambda: None
        self._can_start_behind: dict[str, bool] = {}
        """By layer: whether a model with it replaced can be run from there on only."""

    @torch.no_grad()  # and not inference mode, in which what is sharded could not be gathered
    def __call__(self, progress: Progress = lambda done, of: None) -> Evaluation:
        """Make both passes over the data, the first one only once in a run."""
        subject = self.subject
        changes = CHANGES if self._grafts is None else CHANGES[:1]
        runs = (self._means is None) + (1 + len(changes) * (len(self.names) + 1) if subject.objective else 1)
        steps, of = iter(range(1, runs * subject.num_batches + 1)), runs * subject.num_batches
        self._done = lambda: progress(next(steps), of)
        if self._means is None:
            self._means = self._find_means()
        return self._rest(self._means, changes)

    def _find_means(self) -> dict[str, Tensor]:
        """Compute each layer's mean activation over all counted tokens, float32 `[D]`, the same on all ranks."""
        subject = self.subject
        sums = {
            name: torch.zeros(sae.d_in + 1, dtype=torch.float64, device=subject.device)
            for name, sae in subject.saes.items()
        }
        with tap(subject.model, self.names) as read:
            for _, input_ids, counted in subject.batches():
                counted = counted.to(subject.device)
                for name, acts in read(input_ids.to(subject.device)).items():
                    own = counted & subject.saes[name].counted(acts)
                    sums[name][:-1] += acts[own].sum(0, dtype=torch.float64)
                    sums[name][-1] += own.sum()
                self._done()
        sums = {name: subject.total(each) for name, each in sums.items()}
        for name, each in sums.items():
            if not each[-1]:
                raise UserError(
                    f"{name}: every token is excluded (special tokens, --exclude-tokens, --max-norm-multiple): nothing "
                    "to evaluate"
                )
        return {name: (each[:-1] / each[-1]).float() for name, each in sums.items()}

    def _rest(self, means: dict[str, Tensor], changes: Sequence[str]) -> Evaluation:
        subject, device, count = self.subject, self.subject.device, len(self.subject.data)
        recons = {name: ReconstructionSums(means[name], sae.num_latents, count) for name, sae in subject.saes.items()}
        # All spliced rows are written again; the others stay.
        grafts = self._grafts or {name: GraftSums(count, device) for name in (*self.names, "")}
        clean, scored_S = AnswerSums(count, device), torch.zeros(count, dtype=torch.float64, device=device)
        counted_S = torch.zeros_like(scored_S)
        for numbers, input_ids, counted in subject.batches():
            rows, counted = numbers.to(device), counted.to(device)
            counted_S[rows] = counted.sum(1).double()[: len(rows)]
            asked = numbers if len(numbers) else numbers.new_zeros(1)
            question = None if subject.objective is None else subject.objective(input_ids, asked)
            as_it_is = question is not None and question.input_ids is input_ids
            if not as_it_is:  # masks are nothing that an SAE was trained on: its reconstruction is of the text
                for name, acts in self._read(input_ids.to(device)).items():
                    x, sae = acts.float(), subject.sae(name)
                    recons[name].add(rows, x, sae(x), counted & sae.counted(x))
            if question is None:
                self._done()
                continue
            inputs, targets = question.input_ids.to(device), question.targets.to(device)
            scored_S[rows] = (targets != IGNORED).sum(1).double()[: len(rows)]
            logits, seen = self._clean(inputs)
            clean.add(rows, compare_answers(logits, logits, targets))
            self._done()
            replacements: dict[str, dict[str, Replace]] = {change: {} for change in changes}
            for name in self.names:
                acts = seen.pop(name)
                x, sae = acts.float(), subject.sae(name)
                out, own = sae(x), counted & sae.counted(x)
                del sae
                if as_it_is:
                    recons[name].add(rows, x, out, own)
                if name not in self._can_start_behind:
                    self._can_start_behind[name] = self._starts_behind(name, acts, inputs, logits)
                ways = _changes(out.recon, means[name])
                for change in changes:
                    answers = grafts[name].answers[change]
                    new = torch.where(own[..., None], ways[change](x).to(acts), acts)
                    answers.add(rows, compare_answers(logits, self._logits_behind(name, new, inputs), targets))
                    self._done()
                    replacements[change][name] = _where(own, ways[change])
                replacements["spliced"][name] = self._reconstruct(name)  # of what it is given, not of x
            for change, several in replacements.items():
                answers = grafts[""].answers[change]
                answers.add(rows, compare_answers(logits, self._logits(inputs, several, ~counted), targets))
                self._done()
        self._grafts = grafts
        return self._result(recons, grafts, clean, scored_S, counted_S)

    def _result(
        self,
        recons: dict[str, ReconstructionSums],
        grafts: dict[str, GraftSums],
        clean: AnswerSums,
        scored_S: Tensor,
        counted_S: Tensor,
    ) -> Evaluation:
        subject, total = self.subject, self.subject.total
        with_head = subject.objective is not None
        clean_S, scored_S = clean.total(total).ce, total(scored_S)

        def grafted(name: str) -> Grafted | None:
            return grafts[name].result(clean_S, scored_S, total) if with_head else None

        return Evaluation(
            layers=tuple(LayerResult(name, recons[name].result(total), grafted(name)) for name in self.names),
            together=grafted(""),
            ce_clean=ratio(clean_S, scored_S) if with_head else None,
            objective=subject.objective_name,
            sequences=len(subject.data),
            ctx_len=subject.data.ctx_len,
            tokens=int(total(counted_S).sum()),
            scored=int(scored_S.sum()),
            misplaced=misplaced(subject),
        )

    def _read(self, inputs: Tensor) -> dict[str, Tensor]:
        with tap(self.subject.model, self.names) as read:
            return read(inputs)

    def _clean(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits `[B, T, V]` and each layer's activations `[B, T, D]`, in one pass."""
        seen: dict[str, Tensor] = {}

        def watch(name: str) -> Replace:
            def look(acts: Tensor) -> Tensor:
                # A copy, where the model may go on to change the tensor in place.
                seen[name] = acts if name in self._blocks else acts.clone()
                return acts

            return look

        return self._logits(inputs, {name: watch(name) for name in self.names}), seen

    def _logits(self, inputs: Tensor, replacements: Mapping[str, Replace], excluded: Tensor | None = None) -> Tensor:
        with splice(self.subject.model, replacements, excluded):
            return self.subject.model(input_ids=inputs, **self._no_cache).logits

    def _logits_behind(self, name: str, new: Tensor, inputs: Tensor) -> Tensor:
        """Logits with `new` as the output of one block."""
        if not self._can_start_behind[name]:
            return self._logits(inputs, {name: lambda _: new})
        with start_behind(self.subject.model, name, new):
            return self.subject.model(input_ids=inputs, **self._no_cache).logits

    def _starts_behind(self, name: str, acts: Tensor, inputs: Tensor, logits: Tensor) -> bool:
        """Tell whether the model gives the same from a block's own output on; if not, it is always run as a whole."""
        if not self.start_anywhere:
            return False
        try:
            with start_behind(self.subject.model, name, acts):
                again = self.subject.model(input_ids=inputs, **self._no_cache).logits
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # it misses something that the idle blocks would have left
        return torch.equal(again, logits)

    def _reconstruct(self, name: str) -> Replace:
        return lambda acts: self.subject.sae(name).reconstruct(acts)


def misplaced(subject: Subject) -> tuple[str, ...]:
    """Say which SAEs were trained on another model, or elsewhere in this one, where that is known."""
    said = []
    for name, sae in subject.saes.items():
        known = sae.trained_on
        if known is not None and not known.is_at(name):
            said.append(f"the SAE that is evaluated at {name} was trained at {known.hookpoint}")
    name = subject.model.name_or_path
    known_all = [sae.trained_on for sae in subject.saes.values() if sae.trained_on is not None]
    others = dict.fromkeys(known.model for known in known_all if not known.is_of(name, type(subject.model).__name__))
    return (*said, *(f"the SAEs were trained on {other}, and this model is {name}" for other in others))


def _where(counted: Tensor, replace: Replace) -> Replace:
    """Replace only some tokens, bool `[B, T]`; the others keep their activations."""
    return lambda acts: torch.where(counted[..., None], replace(acts), acts)


def _changes(recon: Tensor, mean_D: Tensor) -> dict[str, Replace]:
    """By what is put in the layer's place; the names are `CHANGES`."""
    ways: tuple[Replace, ...] = (lambda acts: recon, lambda acts: mean_D.expand(acts.shape), torch.zeros_like)
    return dict(zip(CHANGES, ways, strict=True))
