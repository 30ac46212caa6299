"""Evaluating the SAEs between two optimizer steps, on data that trains nothing."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saekit.activations import context_length, predicts, resolve_ctx_len
from saekit.activations.live import check_ids
from saekit.analysis.evaluate import Evaluator
from saekit.analysis.results import few_sequences
from saekit.analysis.subject import NO_HEAD, Subject, choose_objective
from saekit.config import RunConfig
from saekit.data import Sequences, check_tokens, load_sequences, numbers_read, sequences
from saekit.data.held_out import shuffled, unread
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.report import EvalStats, Reporter
from saekit.sae import Sae
from saekit.sae.model import around, without_memory
from saekit.training.frame import Frame
from saekit.training.interrupt import NOT_ASKED, Interruption
from saekit.training.plan import RunPlan
from saekit.training.state import RunState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEDY = "Name other data with --eval-dataset or --eval-split, read less with --max-tokens, or leave out --eval-every"


def load_eval_data(
    cfg: RunConfig, data: Sequences, tokenizer: PreTrainedTokenizerBase | None, ctx_len: int
) -> Sequences | None:
    """Load what `--eval-every` evaluates on: other data, or documents that the run never reads; None without it.

    Args:
        cfg: The run.
        data: What it trains on.
        tokenizer: The language model's; None if it has none, for data that is tokenized already.
        ctx_len: Tokens per sequence.

    Raises:
        UserError: If the run reads everything there is, or the other data cannot be read.
    """
    if cfg.train.eval_every is None:
        return None
    token = cfg.model.token
    other = cfg.data.for_evaluation()
    if other.dataset != cfg.data.dataset:
        return load_sequences(other, tokenizer, ctx_len, token)
    return unread(other, cfg.data, tokenizer, ctx_len, numbers_read(cfg.train, data), token, REMEDY)


def subject_of(
    plan: RunPlan,
    placement: Placement,
) -> Subject | None:
    """Describe what is evaluated every `eval_every` steps, and on what; None without that option.

    A batch has as many tokens as training gives an SAE at a time, so that the SAEs need no more memory than there. The
    SAEs have sizes only: `Evaluating` gets each whole from the placement for as long as it is used.

    Args:
        plan: The run; its source has the language model and the data.
        placement: The ranks.

    Raises:
        UserError: If there is data without the option or the option without data, the data does not suit the model, or
            the activations are not a live model's.
    """
    cfg, source = plan.cfg, plan.source.language_model
    data = None if source is None else source.eval_data
    if cfg.eval_every is not None and source is None:
        name = plan.source.name
        raise UserError(f"eval_every needs the language model itself, and {name} gives its activations only")
    if (cfg.eval_every is None) != (data is None):
        given, missing = ("eval_data", "eval_every") if cfg.eval_every is None else ("eval_every", "eval_data")
        raise UserError(
            f"{given} is given without {missing}: they belong together, and eval_data is text that trains no SAE"
        )
    if cfg.eval_every is None or source is None:
        return None
    model, tokenizer = source.model, source.tokenizer
    chosen = shuffled(sequences(data, cfg.ctx_len), cfg.eval_tokens)
    for each in source.models.values():
        resolve_ctx_len(chosen.ctx_len, context_length(each.config))
    input_ids = chosen.read(np.arange(len(chosen)))
    what = "the data to evaluate on"
    check_tokens(chosen, source.vocabulary, what=what)
    check_ids(input_ids, source.vocabulary, what)
    if not source.counted(input_ids).any():
        raise UserError("of the data to evaluate on every token is excluded (special tokens, --exclude-tokens)")
    no_head = "--shard-lm loads the language model without its head" if cfg.shard_lm else NO_HEAD
    mask_id = None if tokenizer is None else tokenizer.mask_token_id
    objective, name = choose_objective(predicts(model), mask_id, source.excluded, no_head)
    return Subject(
        model=model,
        saes={each.name: without_memory(**each.sizes(cfg)) for each in plan.units},
        data=chosen,
        excluded=source.excluded,
        objective=objective,
        objective_name=name,
        batch_size=max(1, cfg.batch_size // cfg.micro_acc_steps),
        rank=placement.rank,
        world_size=placement.world_size,
        total=placement.sum,
        other=source.other,
        other_name=source.other_name,
    )


class Pause(NamedTuple):
    """The outcome of the moment between two optimizer steps."""

    stop: int
    """Who asked for a stop, over all ranks: a code of `saekit.training.interrupt`."""
    seconds: float = 0.0
    """The time that an evaluation took, which belongs to no step."""


class _StopAsked(Exception):  # noqa: N818
    """Ends an evaluation, on all ranks at the same pass."""


class Evaluating:
    """Evaluates every `eval_every` optimizer steps and after the last one.

    It reads the SAEs as a checkpoint would hold them, and nothing of the training is moved by it: neither its random
    numbers, its batches and counters, nor its gradients and optimizers.

    Args:
        subject: From `subject_of`; None evaluates nothing.
        plan: The run.
        placement: The ranks.
        report: Told what was found.
        interruption: A stop ends an evaluation; the resumed run makes up for it.
    """

    def __init__(
        self,
        subject: Subject | None,
        plan: RunPlan,
        placement: Placement,
        report: Reporter,
        interruption: Interruption,
    ) -> None:
        self.plan = plan
        self.placement = placement
        self.frames: dict[str, Frame] = {}
        """Of transcoders and crosscoders, which the placement lends in the units that they are trained in."""
        self.evaluate = None if subject is None else Evaluator(replace(subject, whole=self._whole))
        self.report = report
        self.interruption = interruption
        if subject is not None:
            report.status(
                f"Evaluating every {plan.cfg.eval_every:,} steps on {len(subject.data):,} sequences of "
                f"{subject.data.ctx_len:,} tokens; predictions: {subject.objective_name}"
            )
            if few := few_sequences(len(subject.data), subject.data.ctx_len, "--eval-tokens"):
                report.status(f"Warning: {few}")

    def due(self, run: RunState) -> bool:
        """Tell whether the SAEs should be evaluated after the step that was just done, and have not been yet."""
        every = self.plan.cfg.eval_every
        if every is None or run.step == run.evaluated:
            return False
        return run.step % every == 0 or run.step == self.plan.total_steps

    def __call__(self, run: RunState) -> Pause:
        """Evaluate if that is due, and find out, once for all ranks, whether a stop was asked for. Collective."""
        if self.evaluate is None or not self.due(run):
            return Pause(self._asked())
        began = time.perf_counter()
        with suppress(_StopAsked):
            for name, sizes in self.evaluate.subject.saes.items():
                known = run.calibration[name]
                sizes.max_norm, sizes.max_norm_out = known.max_norm, known.max_norm_out
                if known.frame is not None:
                    self.frames[name] = known.frame
            found = self.evaluate(self._look_up)
            run.evaluated = run.step
            record = {**found.to_json(), "warnings": found.warnings()}
            self.report.evaluated(EvalStats(run.step, time.perf_counter() - began, record))
        return Pause(self._asked(), time.perf_counter() - began)

    def _whole(self, name: str) -> Sae:
        """Return a coder as a checkpoint would hold it, for activations as they are."""
        sae = self.placement.whole_sae(name)
        frame = self.frames.get(name)
        return sae if frame is None else around(frame.fold(sae.state_dict()), **sae.sizes()).eval()

    def _look_up(self, done: int, of: int) -> None:
        if self._asked() != NOT_ASKED:
            raise _StopAsked

    def _asked(self) -> int:
        return max(request for (request,) in self.placement.exchange([self.interruption.request]))
