"""Evaluates the SAEs between two optimizer steps, on data that is not trained on."""

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
from saekit.training.interrupt import NO_STOP, Interruption
from saekit.training.plan import RunPlan
from saekit.training.state import RunState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEDY = "Name other data with --eval-dataset or --eval-split, lower --max-tokens, or leave out --eval-every"


def load_eval_data(
    cfg: RunConfig, data: Sequences, tokenizer: PreTrainedTokenizerBase | None, ctx_len: int
) -> Sequences | None:
    """Load the data for `--eval-every`: other data, or documents that the run never reads. None without the option.

    Args:
        cfg: The run.
        data: The data that it trains on.
        tokenizer: The language model's; None if it has none, for data that is already tokenized.
        ctx_len: Tokens per sequence.

    Raises:
        UserError: If the run reads all documents, so that none is held out, or the other data cannot be read.
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
    """Return what is evaluated every `eval_every` steps, and the data for it; None without that option.

    A batch has as many tokens as training gives an SAE at a time, so the SAEs need no more memory than in training.
    The SAEs here hold no weights: `Evaluating` gets each whole one from the placement while it is in use.

    Args:
        plan: The run; its source has the language model and the data.
        placement: The ranks.

    Raises:
        UserError: If there is data without the option or the option without data, the data does not suit the model, or
            the source is not a live model.
    """
    cfg, source = plan.cfg, plan.source.language_model
    data = None if source is None else source.eval_data
    if cfg.eval_every is not None and source is None:
        raise UserError(
            f"eval_every needs the language model, but the source {plan.source.name} only gives its activations: "
            "leave out eval_every"
        )
    if (cfg.eval_every is None) != (data is None):
        given, missing = ("eval_data", "eval_every") if cfg.eval_every is None else ("eval_every", "eval_data")
        raise UserError(
            f"{given} is given without {missing}: give both or neither (eval_data is text that no SAE trains on)"
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
        raise UserError("every token of the data to evaluate on is excluded: see special tokens and --exclude-tokens")
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
    """Who requested a stop, over all ranks: a code of `saekit.training.interrupt`."""
    seconds: float = 0.0
    """Seconds that the evaluation took; they belong to no step."""


class _StopRequested(Exception):  # noqa: N818
    """Ends an evaluation after the same pass on all ranks."""


class Evaluating:
    """Evaluates the SAEs every `eval_every` optimizer steps and after the last one.

    It reads the SAEs as a checkpoint would hold them and changes nothing in the training: random numbers, batches,
    counters, gradients and optimizers stay as they are.

    Args:
        subject: From `subject_of`; None evaluates nothing.
        plan: The run.
        placement: The ranks.
        report: Receives the results.
        interruption: A requested stop ends an evaluation. The resumed run then evaluates first.
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
        """The frames of transcoders and crosscoders: the placement returns these coders in their frames."""
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
        """Tell whether an evaluation is due after the last step and has not been made yet."""
        every = self.plan.cfg.eval_every
        if every is None or run.step == run.evaluated:
            return False
        return run.step % every == 0 or run.step == self.plan.total_steps

    def __call__(self, run: RunState) -> Pause:
        """Evaluate if it is due, and find out for all ranks together whether a stop was requested. Collective."""
        if self.evaluate is None or not self.due(run):
            return Pause(self._stop_requested())
        began = time.perf_counter()
        with suppress(_StopRequested):
            for name, sizes in self.evaluate.subject.saes.items():
                known = run.calibration[name]
                sizes.max_norm, sizes.max_norm_out = known.max_norm, known.max_norm_out
                if known.frame is not None:
                    self.frames[name] = known.frame
            found = self.evaluate(self._check_stop)
            run.evaluated = run.step
            record = {**found.to_json(), "warnings": found.warnings()}
            self.report.evaluated(EvalStats(run.step, time.perf_counter() - began, record))
        return Pause(self._stop_requested(), time.perf_counter() - began)

    def _whole(self, name: str) -> Sae:
        """Return a coder as a checkpoint would hold it, with weights for the activations as they are."""
        sae = self.placement.whole_sae(name)
        frame = self.frames.get(name)
        return sae if frame is None else around(frame.fold(sae.state_dict()), **sae.sizes()).eval()

    def _check_stop(self, done: int, of: int) -> None:
        if self._stop_requested() != NO_STOP:
            raise _StopRequested

    def _stop_requested(self) -> int:
        return max(request for (request,) in self.placement.exchange([self.interruption.request]))
