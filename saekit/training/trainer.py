"""The training loop."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from saekit.activations.live import LiveModel
from saekit.activations.mixed import Mixed
from saekit.activations.sites import join
from saekit.activations.source import Batch, Source, Steps
from saekit.config import RunConfig, TrainConfig
from saekit.errors import Interrupted, SaveError, UserError
from saekit.placement import Placement, Single
from saekit.report import Reporter, Reporters, terminal_reporter, tracker_reporter
from saekit.runs.files import write_at_once
from saekit.runs.folder import check_run_folder, goes_on, new_run_folder
from saekit.runs.layout import CONFIG_FILE, LATEST, METRICS_FILE
from saekit.runs.metrics import JsonlReporter
from saekit.training import state
from saekit.training.bad_steps import check_last_step, skip_step
from saekit.training.bank import Bank
from saekit.training.evaluating import Evaluating, subject_of
from saekit.training.fresh import Fresh
from saekit.training.interrupt import BY_USER, graceful_interrupt
from saekit.training.message import StepMessage
from saekit.training.plan import RunPlan, checked, plan_run
from saekit.training.reports import step_stats, warn_of_divergence
from saekit.training.run_folder import checkpoint_to_go_on_from, one_writer
from saekit.training.saving import Saver
from saekit.training.start import calibrate, count_tokens
from saekit.units import active

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_step(
    bank: Bank,
    source: Source,
    batches: Sequence[Batch],
    lr_scale: float,
    *,
    report: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> StepMessage:
    """Take one optimizer step with all units. Collective.

    Args:
        bank: The units.
        source: The source of their activations.
        batches: This rank's micro-batches.
        lr_scale: Factor on the learning rates.
        report: Whether the message contains a report.
        meanwhile: Enqueues work after the step's passes, before the host waits for the message.

    Returns:
        The message about the step. If it shows a fault, the step has changed no weights, counters or optimizers.
    """
    placement = bank.placement
    bank.begin_(count_tokens(source, batches, placement))
    for micro, batch in enumerate(batches, 1):
        acts = source(batch)
        travelling = join(acts.of, bank.sites)
        counted_N = None if acts.counted_N is None else placement.counted(acts.counted_N)
        for name, x_NW in placement.route(travelling, last=micro == len(batches)):
            for chunk_NW, counted_N1 in chunks(x_NW, counted_N, bank.cfg.micro_acc_steps):
                bank.units[name].run_(chunk_NW, counted_N1)
            del x_NW, chunk_NW  # the last unit's tensors would otherwise live through the rest of the step
    # The host requests the step's message before it queues the language model's next batch, so that the GPU has work
    # while the host reads the message and queues the rest. If gradients travel, the GPU would be idle until they have
    # arrived. In that case the batch is queued first, which needs no more memory here than below. The message then
    # arrives later, and the GPU waits for the host to queue the optimizers' first kernels.
    if meanwhile is not None and placement.travelling():
        meanwhile()
        meanwhile = None
    read = bank.finish(placement.collect(), report=report)
    if meanwhile is not None:
        meanwhile()
    message = read()
    if message.faults:
        placement.skip()
    else:
        placement.apply(lr_scale)
        bank.advance_(message)
    return message


def chunks(x_NW: Tensor, counted_N: Tensor | None, count: int) -> list[tuple[Tensor, Tensor | None]]:
    """Split a micro-batch into `count` chunks of tokens, each with its mask of counted tokens, `[n, 1]`, or None."""
    counted: Sequence[Tensor | None] = [None] * count
    if counted_N is not None:
        counted = counted_N[:, None].tensor_split(count)
    return list(zip(x_NW.tensor_split(count), counted, strict=True))


class SaeTrainer:
    """Trains one coder per site of a language model, all at once: SAEs at the chosen hookpoints by default.

    Args:
        cfg: The training's configuration.
        dataset: A data set with a column `input_ids`, as `saekit.data.chunk_and_tokenize` makes it.
        model: Any HuggingFace causal language model or encoder. Training does not change it.
        tokenizer: Defines the special tokens to exclude. Without it, the model's config does.
        source: The source of the activations, instead of `dataset`, `model`, `tokenizer` and `eval_data`.
        run: The whole run's configuration, if there is one (from the command line). It is saved with the run.
        reporter: Shows the run's progress. By default, the live view, or plain lines if there is no terminal.
        placement: Where the coders are. By default, all are in this process, on the model's device. Under a launcher,
            `saekit.placement.connect()` returns the other placements.
        eval_data: The data set that `eval_every` evaluates on, with a column `input_ids`: text that is not trained on.
        other_model: The second language model, if `cfg.crosscode_models` names one. It must have the same vocabulary:
            `saekit.train` compares tokenizers, `SaeTrainer` does not.

    Raises:
        UserError: If the configuration does not fit the model or the data, or the run folder is in use.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        dataset: Any = None,
        model: PreTrainedModel | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        source: Source | None = None,
        run: RunConfig | None = None,
        reporter: Reporter | None = None,
        placement: Placement | None = None,
        eval_data: Any = None,
        other_model: PreTrainedModel | None = None,
    ) -> None:
        self.cfg = checked(cfg)
        if source is None:
            if cfg.activations is not None:
                raise UserError(f"activations={str(cfg.activations)!r} is for saekit.train: give SaeTrainer a source")
            if model is None or dataset is None:
                raise UserError("SaeTrainer needs a data set and a language model, or a source of activations")
            source = LiveModel(
                model,
                dataset,
                tokenizer=tokenizer,
                eval_data=eval_data,
                other=other_model,
                other_name=cfg.crosscode_models,
            )
        self.placement: Placement = placement or Single(model.device if model is not None else torch.device("cpu"))
        if self.placement.device.type == "mps":
            raise UserError(
                "the model is on an Apple GPU (mps), which lacks the float64 that statistics need: move it to the CPU"
            )
        self.placement.check(cfg)
        self.source = source if cfg.mix == 1 else Mixed(source, cfg.mix, cfg.mix_in, Path(cfg.save_dir))
        self.plan: RunPlan = plan_run(cfg, self.source, run, self.placement)
        self.subject = subject_of(self.plan, self.placement)
        self.report = Reporters()
        self._has_checkpoint = goes_on(cfg, self.plan.run_dir)
        if self.placement.rank == 0:  # the numbers are global, so the other ranks report nothing
            check_run_folder(cfg, self.plan.run_dir)
            watchers = [reporter or terminal_reporter(), self._metrics()]
            if cfg.log_with is not None:
                watchers.append(tracker_reporter(cfg.log_with, self.plan.run_dir))
            self.report = Reporters(watchers)

    def _metrics(self) -> JsonlReporter:
        file = self.plan.run_dir / METRICS_FILE
        return JsonlReporter(file, self.report.status if self.cfg.save_best_effort else None)

    def fit(self) -> Path:
        """Train to the end of the data and return the folder of the last checkpoint.

        Raises:
            UserError: If `max_bad_steps` steps in a row or the last step have NaN or Inf, token ids are not in the
                model's vocabulary, the checkpoint to resume or start from cannot be used, or another process trains in
                the run's folder.
            SaveError: If a checkpoint cannot be written.
            Interrupted: After Ctrl-C, SIGTERM or SIGUSR1, once the step is finished and the checkpoint is saved.
        """
        cfg, plan, source, report = self.cfg, self.plan, self.source, self.report
        with (
            torch.enable_grad(),  # a notebook may have turned gradients off
            report,
            one_writer(cfg, plan.run_dir, self.placement, report.status) as check_lock,
            graceful_interrupt(cfg.grace, self._last_words) as interruption,
            source.open(),
            ExitStack() as opened,
        ):
            opened.push(self._closing)
            evaluate = Evaluating(self.subject, plan, self.placement, report, interruption)
            run, bank = self._start()
            saver = Saver(plan, bank, run, report.status)
            clock, tokens_at_report = time.perf_counter(), run.tokens
            steps = opened.enter_context(Steps(source, run.step, plan.total_steps).open())
            opened.push(self._closing)  # closing the steps can wait for a disk

            stop = evaluate(run).stop if evaluate.due(run) else 0  # an evaluation that a stop has prevented
            for step, batches in steps if not stop else ():
                run.step = step + 1
                save = run.step == plan.total_steps or run.step % cfg.save_every == 0
                due = save or run.step % cfg.log_every == 0
                # No overlap before a save, which bad data of the next step must not prevent, or before an evaluation,
                # which needs the memory.
                overlap = source.runs_behind and not save and not evaluate.due(run)
                meanwhile = steps.begin_next if overlap else None
                message = train_step(bank, source, batches, plan.lr_scale(step), report=due, meanwhile=meanwhile)
                if message.faults:
                    report.status(skip_step(run, message.faults, cfg.max_bad_steps))
                else:
                    run.tokens += message.tokens
                    run.bad_in_row = 0

                # Read once, so all ranks stop at the same step: a later Ctrl-C stops the run after the next step.
                stop, seconds = evaluate(run)
                clock += seconds
                if due or stop:
                    now = time.perf_counter()  # read once: the wait for the report counts in the next interval
                    rate = (run.tokens - tokens_at_report) / (now - clock)
                    stats = step_stats(run, plan, self.placement, message.report or bank.report(), rate)
                    clock, tokens_at_report = now, run.tokens
                    report.step(stats)
                    saver.note(stats)
                    bank.clear_window()
                    if run.step == plan.total_steps and stats.diverged:
                        report.status(warn_of_divergence(stats))
                if stop or save:
                    check_lock()
                    self._save(saver, last=bool(stop) or run.step == plan.total_steps)
                if stop:
                    break
        if run.step < plan.total_steps:
            raise Interrupted(run.step, plan.run_dir, by_user=stop == BY_USER)
        check_last_step(run)
        return (plan.run_dir / LATEST).resolve()

    def _start(self) -> tuple[state.RunState, Bank]:
        """Make, calibrate or restore, and place the units; only then make the run's folder."""
        cfg, plan, placement = self.cfg, self.plan, self.placement
        run = state.RunState()
        found = checkpoint_to_go_on_from(plan, placement, self.report.status)
        sample: dict[str, Tensor] = {}
        if found is None:
            self.report.status("Calibrating on the first batch")
            run.calibration, sample = calibrate(self.source.read(0), plan, placement, self.report.status)
        else:
            run.calibration = state.read_calibration(found.folder, plan.sites)
        fresh = Fresh(plan, run.calibration, sample, resumes=found is not None)
        placement.place(plan.costs, fresh, fresh.optimizer)
        own = active(cfg.sae.k, cfg.sae.activation)
        if cfg.finetune is not None:
            fresh.earlier.update(*placement.gather(fresh.earlier))
        if fresh.earlier - {own}:
            before = ", ".join(sorted(fresh.earlier))
            self.report.status(f"Warning: the {plan.coder}s of --finetune have k {before}, this run has k {own}")
        bank = Bank(cfg, placement, plan.units, run.calibration)
        if found is not None:
            state.restore(found.folder, found.index, run, bank)

        if placement.rank == 0:
            self._open_run_folder(run.step)
        placement.gather(None)  # all ranks wait until the folder is there
        return run, bank

    def _open_run_folder(self, step: int) -> None:
        cfg, plan = self.cfg, self.plan
        with new_run_folder(cfg, plan.run_dir):
            write_at_once(plan.run_dir / CONFIG_FILE, yaml.safe_dump(plan.config(), sort_keys=False))
            self.report.start(plan.info(self.placement, step))

    def _closing(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception):
            self.placement.closing(error)

    def _last_words(self, message: str) -> None:
        # `first_to_fail` also ends the ranks on other machines, which may have received no signal.
        if self.placement.first_to_fail():  # write to the file descriptor: the run may be waiting for stderr's lock
            cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
            way = f"--resume {self.plan.run_dir} continues from the last checkpoint"
            way = way if self._has_checkpoint else "it has not saved a checkpoint yet"  # the disk may be the trouble
            os.write(2, f"{cursor}\nError: {message}; {way}\n".encode())

    def _save(self, saver: Saver, last: bool) -> None:
        self.source.forget()  # a signal may have come after the next step was begun
        try:
            folder = saver.save_last() if last else saver.save()
        except SaveError as error:
            if last or not self.cfg.save_best_effort:
                raise
            self.report.status(f"Warning: {error}; training goes on")
        else:
            self._has_checkpoint = True
            self.report.saved(folder, saver.run.step)
