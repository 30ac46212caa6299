"""The passes of an evaluation: the coders' predictions, and the language model's loss with them spliced in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saekit.activations.chosen import check_widths
from saekit.activations.pair import Models, tap_all
from saekit.activations.sites import Site, hookpoints_of
from saekit.activations.splice import Predict, Replace
from saekit.analysis.altered import Altered, changes_of, joined, where
from saekit.analysis.results import (
    Estimate,
    Evaluation,
    Grafted,
    LayerResult,
    OtherResult,
    PartResult,
    SkipResult,
    ratio,
)
from saekit.analysis.subject import IGNORED, Subject, compare_answers, misplaced
from saekit.analysis.sums import CHANGES, SKIP, AnswerSums, ErrorSums, GraftSums, ReconstructionSums
from saekit.errors import UserError
from saekit.sae import SaeOutput

Progress = Callable[[int, int], None]
"""Called with the number of passes over a batch that are done, and their total."""


def evaluate(
    subject: Subject, progress: Progress = lambda done, of: None, *, start_anywhere: bool = True
) -> Evaluation:
    """Evaluate coders on a language model's activations, and the model with their predictions spliced in.

    Makes two passes over the sequences: one for the targets' means, and one for everything else. For each batch, the
    clean model runs once. With a head, it also runs spliced, mean-ablated and zero-ablated, once for each coder and
    once for all coders together. These runs can skip the blocks before what the coder writes. A transcoder with a skip
    connection gets one more run, with only the skip connection. A crosscoder's outputs are replaced in a second forward
    pass, computed from the clean one. If there are two models, each has all of these runs, with its part of the
    prediction.

    Args:
        subject: The coders, model and data.
        progress: Called after each pass over a batch.
        start_anywhere: Whether to skip blocks if a check shows that the result is the same.

    Raises:
        UserError: If a coder does not fit the model, if two write the same hookpoint, or if every token is excluded.
    """
    return Evaluator(subject, start_anywhere)(progress)


class Evaluator:
    """Evaluates a subject repeatedly, while its coders change.

    The first call computes what does not depend on the coders: the means and the ablations.

    Args:
        subject: The coders, model and data.
        start_anywhere: See `evaluate`.

    Raises:
        UserError: If a coder does not fit the model, or if two write the same hookpoint.
    """

    def __init__(self, subject: Subject, start_anywhere: bool = True) -> None:
        self.sites = sites = _sites(subject)
        check_widths(subject.models, sites.values())
        self.subject = subject
        self.names = list(subject.saes)
        self.hookpoints = [each.name for each in hookpoints_of(sites.values())]
        answering = list(subject.models.items())[: subject.answering]
        self.asked = [Altered(each, self.hookpoints, start_anywhere, prefix) for prefix, each in answering]
        """The models with a head for the task."""
        self._last_use = {part.name: name for name, site in sites.items() for part in site.parts}
        self._skips = [name for name, sae in subject.saes.items() if sae.W_skip is not None]
        self._means: dict[str, Tensor] | None = None
        self._grafts: list[dict[str, GraftSums]] = []
        """Sums of the last call by coder, for each model in `asked`. "" stands for all coders together."""
        self._done: Callable[[], None] = lambda: None

    @torch.no_grad()  # not inference mode, in which sharded parameters cannot be gathered
    def __call__(self, progress: Progress = lambda done, of: None) -> Evaluation:
        """Make both passes over the data, the first one only in the first call. Collective.

        Raises:
            UserError: If every token is excluded.
        """
        subject = self.subject
        changes = CHANGES[:1] if self._grafts else CHANGES
        grafted = len(changes) * (len(self.names) + 1) + len(self._skips)
        runs = (self._means is None) + 1 + grafted * len(self.asked)
        steps, of = iter(range(1, runs * subject.num_batches + 1)), runs * subject.num_batches
        self._done = lambda: progress(next(steps), of)
        if self._means is None:
            self._means = self._first_pass()
        return self._second_pass(self._means, changes)

    def _first_pass(self) -> dict[str, Tensor]:
        """Compute the mean of each coder's target over the counted tokens of all ranks, float32 `[D_out]`."""
        subject = self.subject
        sums = {
            name: torch.zeros(site.d_out + 1, dtype=torch.float64, device=subject.device)
            for name, site in self.sites.items()
        }
        with tap_all(subject.models, self.hookpoints) as read:
            for _, input_ids, counted in subject.batches():
                counted, seen = counted.to(subject.device), read(input_ids.to(subject.device))
                for name in self.names:
                    x, y = self._ends(name, seen)
                    own = counted & subject.saes[name].counted(x, y)
                    sums[name][:-1] += (x if y is None else y)[own].sum(0, dtype=torch.float64)
                    sums[name][-1] += own.sum()
                self._done()
        sums = {name: subject.total(each) for name, each in sums.items()}
        for name, each in sums.items():
            if not each[-1]:
                raise UserError(
                    f"{name}: every token is excluded, so there is nothing to evaluate. Check --exclude-tokens, "
                    "--exclude-special-tokens and --max-norm-multiple"
                )
        return {name: (each[:-1] / each[-1]).float() for name, each in sums.items()}

    def _ends(self, name: str, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return a coder's input, `[B, T, D]`, and a transcoder's target or None, in float32.

        Args:
            name: The coder's name.
            seen: Activations by hookpoint. Those that no later coder needs are removed.
        """
        site = self.sites[name]
        x = joined([seen[part.name] for part in site.reads])
        y = joined([seen[part.name] for part in site.writes]) if site.transcodes else None
        for part in site.parts:
            if self._last_use[part.name] == name:
                seen.pop(part.name, None)
        return x, y

    def _second_pass(self, means: dict[str, Tensor], changes: Sequence[str]) -> Evaluation:
        subject, device, count = self.subject, self.subject.device, len(self.subject.data)
        widths = {name: [part.width for part in site.writes] for name, site in self.sites.items()}
        recons = {
            name: ReconstructionSums(means[name], widths[name], sae.num_latents, count)
            for name, sae in subject.saes.items()
        }
        linear = {name: ErrorSums(means[name], widths[name], count) for name in self._skips}
        # A later call overwrites all rows of "spliced", and keeps the ablations of the first call.
        grafts = self._grafts or [{name: GraftSums(count, device) for name in (*self.names, "")} for _ in self.asked]
        clean = [AnswerSums(count, device) for _ in self.asked]
        silent = dict(list(subject.models.items())[len(self.asked) :])
        scored_S = torch.zeros(count, dtype=torch.float64, device=device)
        counted_S = torch.zeros_like(scored_S)

        def add_errors(
            name: str, rows: Tensor, target: Tensor, out: SaeOutput, skip: Tensor | None, counted: Tensor
        ) -> None:
            recons[name].add(rows, target, out, counted)
            if skip is not None:
                linear[name].add(rows, target, skip, counted)

        for numbers, input_ids, counted in subject.batches():
            rows, counted = numbers.to(device), counted.to(device)
            counted_S[rows] = counted.sum(1).double()[: len(rows)]
            known = numbers if len(numbers) else numbers.new_zeros(1)
            question = None if subject.objective is None else subject.objective(input_ids, known)
            unmasked = question is not None and question.input_ids is input_ids
            if not unmasked:  # SAEs were not trained on mask tokens, so measure reconstruction on the unmasked text
                seen = self._read(subject.models, input_ids.to(device))
                for name in self.names:
                    (x, y), sae = self._ends(name, seen), subject.sae(name)
                    skip = sae.without_latents(x) if name in linear else None
                    add_errors(name, rows, x if y is None else y, sae(x), skip, counted & sae.counted(x, y))
            if question is None:
                self._done()
                continue
            inputs, targets = question.input_ids.to(device), question.targets.to(device)
            scored_S[rows] = (targets != IGNORED).sum(1).double()[: len(rows)]
            seen, answered = self._read(silent, inputs), []
            for model, sums in zip(self.asked, clean, strict=True):
                as_is, own_seen = model.clean(inputs)
                answered.append(as_is)
                seen |= own_seen
                del own_seen  # otherwise activations would stay in memory until the next batch
                sums.add(rows, compare_answers(as_is.logits, as_is.logits, targets))
            self._done()
            replacements: dict[str, dict[str, Replace | Predict]] = {change: {} for change in changes}
            for name in self.names:
                site = self.sites[name]
                written = {part.name: seen[part.name] for part in site.writes}
                (x, y), sae = self._ends(name, seen), subject.sae(name)
                out, own = sae(x), counted & sae.counted(x, y)
                skip = sae.without_latents(x) if name in linear else None
                del sae
                if unmasked:
                    add_errors(name, rows, x if y is None else y, out, skip, own)
                ways = changes_of(written, out.recon, means[name], skip)
                for model, as_is, sums_of in zip(self.asked, answered, grafts, strict=True):
                    own_hookpoints = [hookpoint for hookpoint in written if hookpoint in model.hookpoints]
                    for change in (*changes, *([SKIP] if skip is not None else [])):
                        new = {hookpoint: where(own, ways[hookpoint][change]) for hookpoint in own_hookpoints}
                        changed = model.logits_from(as_is, new, inputs)
                        sums_of[name].answers[change].add(rows, compare_answers(as_is.logits, changed, targets))
                        self._done()
                        if change != SKIP:
                            replacements[change] |= new
                # Spliced in together, a coder reads what the earlier ones left, not x. A crosscoder cannot: it also
                # reads later hookpoints.
                if len(site.writes) == 1:
                    replacements["spliced"][site.writes[0].name] = self._reconstruct(name)
            for model, as_is, sums_of in zip(self.asked, answered, grafts, strict=True):
                for change, several in replacements.items():
                    own_new = {name: replace for name, replace in several.items() if name in model.hookpoints}
                    changed = model.logits(inputs, own_new, ~counted)
                    sums_of[""].answers[change].add(rows, compare_answers(as_is.logits, changed, targets))
                    self._done()
        self._grafts = grafts
        return self._result(recons, linear, grafts, clean, scored_S, counted_S)

    def _result(
        self,
        recons: dict[str, ReconstructionSums],
        linear: dict[str, ErrorSums],
        grafts: list[dict[str, GraftSums]],
        clean: list[AnswerSums],
        scored_S: Tensor,
        counted_S: Tensor,
    ) -> Evaluation:
        subject, total = self.subject, self.subject.total
        cleans_S, scored_S = [each.total(total).ce for each in clean], total(scored_S)

        def grafted(name: str, spliced_in: str = CHANGES[0], model: int = 0) -> Grafted | None:
            if model >= len(self.asked):
                return None
            return grafts[model][name].result(cleans_S[model], scored_S, total, spliced_in)

        def layer(name: str) -> LayerResult:
            site, (whole, parts) = self.sites[name], recons[name].result(total)
            skip = linear[name].result(total)[1] if name in linear else None
            return LayerResult(
                name,
                whole,
                grafted(name),
                site.kind,
                tuple(part.name for part in site.reads),
                tuple(part.name for part in site.writes),
                tuple(PartResult(part.name, *each) for part, each in zip(site.writes, parts, strict=False)),
                None if skip is None else SkipResult(*skip, grafted(name, SKIP)),
                grafted(name, model=1),
            )

        def cross_entropy(model: int) -> Estimate | None:
            return ratio(cleans_S[model], scored_S) if model < len(self.asked) else None

        return Evaluation(
            layers=tuple(map(layer, self.names)),
            together=grafted(""),
            ce_clean=cross_entropy(0),
            objective=subject.objective_name,
            sequences=len(subject.data),
            ctx_len=subject.data.ctx_len,
            tokens=int(total(counted_S).sum()),
            scored=int(scored_S.sum()),
            misplaced=misplaced(subject),
            other=None
            if subject.other is None
            else OtherResult(str(subject.other_name), cross_entropy(1), grafted("", model=1)),
        )

    def _read(self, models: Models, inputs: Tensor) -> dict[str, Tensor]:
        with tap_all(models, self.hookpoints) as read:
            return read(inputs)

    def _reconstruct(self, name: str) -> Replace | Predict:
        site = self.sites[name]
        if site.transcodes:
            reads = tuple(part.name for part in site.reads)
            return Predict(reads, lambda x, target: self.subject.sae(name).reconstruct(x, target))
        return lambda acts: self.subject.sae(name).reconstruct(acts)


def _sites(subject: Subject) -> dict[str, Site]:
    try:
        sites = subject.sites
    except ValueError as error:
        raise UserError(str(error)) from None
    writers: dict[str, str] = {}
    for name, site in sites.items():
        for part in site.writes:
            if part.name in writers:
                raise UserError(
                    f"{writers[part.name]} and {name} both write {part.name}, so they cannot be spliced in together: "
                    "evaluate each by itself, with the path of its folder"
                )
            writers[part.name] = name
    return sites
