"""The training loop."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from saekit.activations import tap
from saekit.config import RunConfig, TrainConfig
from saekit.data import read_ahead
from saekit.errors import Interrupted, SaveError, UserError
from saekit.files import write_at_once
from saekit.placement import Placement, Single
from saekit.report import JsonlReporter, Reporter, Reporters, terminal_reporter, tracker_reporter
from saekit.report.units import active
from saekit.sae import Sae, sae_losses
from saekit.training import state
from saekit.training.counters import LayerCounters
from saekit.training.evaluating import Evaluating, subject_of
from saekit.training.faults import leave_out_step, look_for_faults, name_faults
from saekit.training.forward import Forward
from saekit.training.interrupt import BY_USER, graceful_interrupt
from saekit.training.optimizers import make_optimizer
from saekit.training.plan import plan_run
from saekit.training.readback import read_later
from saekit.training.recovery import Found, find_checkpoint
from saekit.training.run_folder import check_run_folder, goes_on, new_run_folder
from saekit.training.saving import Saver, refuse_other_run
from saekit.training.scales import Scales, error_per_token, scales_of
from saekit.training.start import calibrate, fit_encoder_
from saekit.training.statistics import LayerWindow, covered
from saekit.training.step_stats import read_windows
from saekit.training.thresholds import count_codes, move_selections_

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SaeTrainer:
    """Trains one SAE per chosen layer of a language model, all layers at once.

    Args:
        cfg: How to train.
        dataset: A data set with a column `input_ids`, as `saekit.data.chunk_and_tokenize` makes it.
        model: Any HuggingFace causal language model or encoder; it is only read, and left as it was.
        tokenizer: Where the special tokens to leave out come from; without it, the ids in the model's config.
        source: The whole run's configuration where there is one (the command line's); it is saved with the run.
        reporter: Who watches; by default the live view, or plain lines where there is no terminal.
        placement: Where the SAEs live; by default all on the model's device, in this process. Under a launcher,
            `saekit.placement.connect()` gives the others.
        eval_data: What `eval_every` evaluates on, a data set as `dataset` is: text that the SAEs are not trained on.

    Raises:
        UserError: If the configuration does not fit the model or the data, or the run folder is in use.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        dataset: Any,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        source: RunConfig | None = None,
        reporter: Reporter | None = None,
        placement: Placement | None = None,
        eval_data: Any = None,
    ) -> None:
        self.cfg = cfg
        self.model = model
        if model.device.type == "mps":
            raise UserError("the model is on Apple's GPU, which has no float64 for the statistics: move it to the CPU")
        self.placement: Placement = placement or Single(model.device)
        self.plan = plan_run(cfg, dataset, model, tokenizer, source, self.placement)
        self.subject = subject_of(self.plan, model, tokenizer, eval_data, self.placement)
        self.report = Reporters()
        if self.placement.rank == 0:  # the others train in silence: the numbers are global
            check_run_folder(cfg, self.plan.run_dir)
            watchers = [reporter or terminal_reporter(), self._metrics()]
            if cfg.log_with is not None:
                watchers.append(tracker_reporter(cfg.log_with, self.plan.run_dir))
            self.report = Reporters(watchers)

    def _metrics(self) -> JsonlReporter:
        file = self.plan.run_dir / "metrics.jsonl"
        return JsonlReporter(file, self.report.status if self.cfg.save_best_effort else None)

    def fit(self) -> Path:
        """Train to the end of the data and return the folder of the last checkpoint.

        Raises:
            UserError: If `max_bad_steps` in a row hold NaN or Inf, the tokens are not the model's, or a checkpoint to
                start from cannot be used.
            SaveError: If a checkpoint cannot be written.
            Interrupted: After Ctrl-C, SIGTERM or SIGUSR1, once the step is finished and the checkpoint is in place.
        """
        cfg, plan, placement, report = self.cfg, self.plan, self.placement, self.report
        with (
            report,
            graceful_interrupt(cfg.grace, self._last_words) as interruption,
            tap(self.model, plan.hookpoints) as read_residual,
            ExitStack() as opened,
        ):
            evaluate = Evaluating(self.subject, plan, placement, report, interruption)
            forward = Forward(self.model, read_residual, plan, placement)
            run = self._start(forward)
            num_dead = {name: int(each.count_dead(plan.dead_threshold)) for name, each in run.counters.items()}
            saver = Saver(plan, placement, run, report.status)
            windows = self._fresh_windows()
            clock, tokens_at_report = time.perf_counter(), run.tokens
            steps = opened.enter_context(closing(read_ahead(self._batches, run.step, plan.total_steps)))

            stop = evaluate(run).stop if evaluate.due(run) else 0  # what a stop has prevented
            coming = None if stop else next(steps, None)
            while coming is not None:
                step, batches = coming
                # The loss is a sum over tokens divided by numbers that are fixed here, before any backward pass.
                tokens = forward.count_tokens(batches)
                scale = {name: scales_of(cfg, run, name, tokens) for name in placement.layers()}
                dead = self._dead(run, num_dead)

                fresh = self._fresh_windows()
                for micro, input_ids in enumerate(batches, 1):
                    acts = forward(input_ids)
                    for name, x_ND in placement.route(acts, last=micro == len(batches)):
                        for chunk_ND in x_ND.tensor_split(cfg.micro_acc_steps):
                            self._pass(name, chunk_ND, scale[name], dead[name], run, fresh[name])
                        del x_ND, chunk_ND  # else the last layer's would stay through the rest of the step

                # All that the host must know of the step comes in one message, asked for before the language model's
                # next batch is put behind it: a GPU has work while the host reads, and while it asks for the rest.
                faults = look_for_faults(plan.hookpoints, fresh, placement.collect(), placement)
                fired = placement.share({name: run.counters[name].fired_now_M for name in fresh})
                errors = error_per_token(cfg, fresh, plan.hookpoints, tokens, placement)
                after = {name: run.counters[name].after(fired[name], tokens) for name in fresh}
                dead_after = [each.count_dead(plan.dead_threshold) for each in after.values()]
                codes = count_codes(cfg, run, fresh, plan.hookpoints, placement)
                message = read_later(torch.cat([faults.flatten(), *(count.view(1) for count in dead_after)]))
                run.step = step + 1
                save = run.step == plan.total_steps or run.step % cfg.save_every == 0
                # What is to be saved is, before new data can be at fault; an evaluation needs the memory.
                overlap = forward.runs_behind and not save and not evaluate.due(run)
                if overlap and (coming := next(steps, None)) is not None:
                    forward.begin(coming[1][0])

                numbers = message()
                if bad := name_faults(plan.hookpoints, numbers[: faults.numel()]):
                    placement.skip()
                    report.status(leave_out_step(run, bad, cfg.max_bad_steps))
                else:
                    placement.apply(plan.lr_scale(step))
                    run.counters.update(after)
                    run.error.update(errors)
                    num_dead.update(zip(after, numbers[faults.numel() :], strict=True))
                    move_selections_(run, codes, placement)
                    for name, window in windows.items():
                        fresh[name].steps = 1
                        window.add(fresh[name])
                    run.tokens += tokens
                    run.bad_in_row = 0

                # Read once: Ctrl-C from here on ends the next step, not this one unsaved. All ranks end the same step.
                stop, seconds = evaluate(run)
                clock += seconds
                if stop or save or run.step % cfg.log_every == 0:
                    now = time.perf_counter()  # once: what the report waits for belongs to the next interval
                    since = run.tokens - tokens_at_report
                    stats = read_windows(windows, num_dead, run, plan, placement, since, now - clock)
                    clock = now
                    report.step(stats)
                    saver.note(stats)
                    windows = self._fresh_windows()
                    tokens_at_report = run.tokens
                if stop or save:
                    self._save(saver, last=bool(stop) or run.step == plan.total_steps)
                if stop:
                    break
                coming = coming if overlap else next(steps, None)
        if run.step < plan.total_steps:
            raise Interrupted(run.step, plan.run_dir, by_user=stop == BY_USER)
        return (plan.run_dir / "latest").resolve()

    def _pass(
        self,
        name: str,
        chunk_ND: Tensor,
        scale: Scales,
        dead: tuple[Tensor | None, Tensor | None, int],
        run: state.RunState,
        window: LayerWindow,
    ) -> None:
        """Forward and backward pass of one layer over a chunk of tokens; what they make is gone when it returns."""
        sae = self.placement.sae(name)
        x_ND, covered_N1 = covered(sae, chunk_ND.float())
        out = sae(x_ND, dead[0], aux=dead[1]).only(covered_N1)
        losses = sae_losses(
            x_ND,
            out,
            scale=scale.main,
            auxk_alpha=self.cfg.auxk_alpha,
            num_dead=dead[2],
            auxk_scale=scale.auxk,
            revive_alpha=self.cfg.revive_alpha,
            revive_scale=scale.revive,
        )
        self.placement.backward(name, losses.total)
        run.counters[name].observe(out.fired, out.indices)
        window.observe(x_ND, out, losses, scale.main, run.calibration[name].mean_D)

    def _start(self, forward: Forward) -> state.RunState:
        """Make and place the SAEs, calibrate or restore them, and only then make the run's folder."""
        cfg, plan, placement = self.cfg, self.plan, self.placement
        run = state.RunState()
        found = self._find_checkpoint()
        sample: dict[str, Tensor] = {}
        if found is None:
            self.report.status("Calibrating on the first batch")
            run.calibration, sample = calibrate(forward, self._batches(0), plan, placement, self.report.status)
        else:
            run.calibration = state.read_calibration(found.folder, plan.hookpoints)
        scales: dict[Sae, float] = {}
        earlier: set[str] = set()

        def make_sae(hookpoint: str) -> Sae:
            sae = state.new_sae(plan, hookpoint)
            sae.max_norm = run.calibration[hookpoint].max_norm
            if found is None:
                sae.b_dec.data.copy_(run.calibration[hookpoint].mean_D)
            rows_RD = sample.pop(hookpoint, None)
            if rows_RD is not None and cfg.init == "fit":
                fit_encoder_(sae, rows_RD)
            if found is None and cfg.finetune is not None:
                source = state.load_finetune(cfg.finetune, hookpoint, sae, alone=len(plan.hookpoints) == 1)
                earlier.add(active(source.k, source.activation))
            if rows_RD is not None:
                sae.fit_selection_(rows_RD, run.calibration[hookpoint].rms)
            scales[sae] = run.calibration[hookpoint].rms if cfg.scale_biases else 1.0
            return sae

        # What a placement makes later, to put a sharded layer together, takes no step: its rate does not matter.
        placement.place(plan.hookpoints, make_sae, lambda sae: make_optimizer(cfg, sae, scales.get(sae, 1.0)))
        own = active(cfg.sae.k, cfg.sae.activation)
        if earlier - {own}:
            self.report.status(f"Warning: the SAEs of --finetune have k {', '.join(sorted(earlier))}, this run k {own}")
        for name in placement.layers():
            run.counters[name] = LayerCounters.fresh(plan.num_latents, placement.device)
            variance = run.calibration[name].variance
            run.error[name] = torch.tensor(variance, dtype=torch.float64, device=placement.device)
        if found is not None:
            state.restore(found.folder, found.index, run, placement)

        if placement.rank == 0:
            self._open_run_folder(run.step)
        placement.gather(None)  # nobody goes on before the folder is there
        return run

    def _find_checkpoint(self) -> Found | None:
        """What to go on from, if the run goes on. One rank looks, so that all take the same."""
        cfg, plan = self.cfg, self.plan
        found = None
        if self.placement.rank == 0 and goes_on(cfg, plan.run_dir):
            self.report.status("Looking for a whole checkpoint")
            found = find_checkpoint(cfg.resume if isinstance(cfg.resume, Path) else plan.run_dir)
            refuse_other_run(found.index, plan)
            for damage in found.passed_over:
                self.report.status(f"Warning: {damage}")
            self.report.status(f"Going on from {found.folder}")
        return self.placement.gather(found)[0]

    def _open_run_folder(self, step: int) -> None:
        cfg, plan, placement = self.cfg, self.plan, self.placement
        with new_run_folder(cfg, plan.run_dir):
            write_at_once(plan.run_dir / "config.yaml", yaml.safe_dump(plan.config(), sort_keys=False))
            self.report.start(plan.info(placement, self.model.dtype, step))

    def _batches(self, step: int) -> list[Tensor]:
        """This rank's micro-batches of an optimiser step."""
        placement = self.placement
        return list(self.plan.batches.step(step, placement.rank, placement.world_size, self.cfg.grad_acc_steps))

    def _dead(
        self, run: state.RunState, num_dead: dict[str, int]
    ) -> dict[str, tuple[Tensor | None, Tensor | None, int]]:
        """For each layer of this rank which latents are dead, their numbers where AuxK needs them, and how many."""
        cfg, threshold = self.cfg, self.plan.dead_threshold
        return {
            name: (
                counters.is_dead(threshold) if cfg.revive_alpha > 0 else None,
                counters.dead(threshold, num_dead[name]) if cfg.auxk_alpha > 0 else None,
                num_dead[name],
            )
            for name, counters in run.counters.items()
        }

    def _last_words(self, message: str) -> None:
        if self.placement.rank == 0:  # straight to the terminal: whoever holds a lock on it may be what takes so long
            cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
            os.write(2, f"{cursor}\nError: {message}; --resume goes on from the last checkpoint\n".encode())

    def _save(self, saver: Saver, last: bool) -> None:
        try:
            self.report.saved(saver.save(), saver.run.step)
        except SaveError as error:
            if last or not self.cfg.save_best_effort:
                raise
            self.report.status(f"Warning: {error}; training goes on")

    def _fresh_windows(self) -> dict[str, LayerWindow]:
        d_in, device, num_sums = self.plan.d_in, self.placement.device, self.cfg.sae.kind.num_sums
        return {name: LayerWindow.empty(d_in, device, num_sums) for name in self.placement.layers()}
