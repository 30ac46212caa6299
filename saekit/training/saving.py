"""Saves a run: the checkpoint, the links `latest` and `best`, and the deletion of old checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from saekit._version import __version__
from saekit.errors import SaveError, UserError
from saekit.machine import library_versions
from saekit.report import StepStats
from saekit.runs import checkpoint
from saekit.runs.files import discard, point
from saekit.runs.folder import way_on
from saekit.runs.layout import BEST, INDEX_FILE, checkpoint_folders
from saekit.training.bank import Bank
from saekit.training.plan import RunPlan
from saekit.training.state import RunState, records

Part = TypeVar("Part")

PATIENCE, PAUSE = 3600.0, 30.0
"""Seconds for which the last save of a run is tried again if the disk refuses it, and seconds between two tries."""

HARMLESS = frozenset(
    {"save_every", "save_dir", "keep_last", "save_best", "overwrite", "resume", "log_every", "log_with", "num_proc"}
    | {"eval_every", "eval_tokens", "eval_dataset", "eval_split"}
    | {"micro_acc_steps", "finetune", "run_name", "hf_token"}
    | {"save_best_effort", "max_bad_steps", "grace", "plugin"}
    | {"mix_in", "activations"}
    | {"placement", "layer_map", "shard_lm", "batch_size", "grad_acc_steps", "kernels", "select_dtype"}
)
"""Options that a resumed run may change, because the training does not depend on them.

How the global batch is split does not matter; `RunPlan.resolved` holds its size."""


NOT_YET = {"mix": 1}
"""The values of options in checkpoints that are older than the options."""
DERIVED = frozenset(
    {"lr", "lr_warmup_steps", "decoder_lr_ratio", "encoder_bias_lr_ratio", "dead_feature_threshold", "num_latents"}
)
"""Options whose defaults depend on other options and on the data."""


class Saver:
    """Writes the checkpoints of one run and keeps track of the best."""

    def __init__(self, plan: RunPlan, bank: Bank, run: RunState, warn: Callable[[str], None]) -> None:
        self.plan = plan
        self.warn = warn
        self.bank = bank
        self.placement = bank.placement
        self.run = run
        self.fvu: dict[str, float] = {}
        """The FVUs of the last report, by hookpoint."""
        self.mean_fvus: list[float] = []
        """The mean FVU over layers of each report since the last checkpoint."""

    def note(self, stats: StepStats) -> None:
        """Record the FVUs of a report: the mean since the last checkpoint decides which checkpoint is `best`."""
        if math.isfinite(stats.mean_fvu):  # not finite if every step since the last report was skipped
            self.fvu = {name: layer.fvu for name, layer in stats.layers.items()}
            self.mean_fvus.append(stats.mean_fvu)

    def save(self) -> Path:
        """Write a checkpoint of the last step and return its folder. Collective.

        Raises:
            SaveError: On all ranks, if one of them cannot write. Earlier checkpoints are unchanged.
            UserError: On all ranks, if one of them has weights that are not finite, or if replicas differ.
        """
        run, plan = self.run, self.plan
        self._compare_replicas()
        mean_fvu = sum(self.mean_fvus) / len(self.mean_fvus) if self.mean_fvus else float("inf")
        improved, best_fvu = mean_fvu < run.best_fvu, min(run.best_fvu, mean_fvu)
        resolved = plan.resolved()
        about = {**plan.about(), "saekit_version": __version__}
        index = {
            "tokens": run.tokens,
            "skipped_steps": run.skipped,
            "bad_steps_in_row": run.bad_in_row,
            "last_fault": run.last_fault,
            "lowest_fvu": run.lowest,
            "evaluated_step": run.evaluated,
            **plan.place(run.step),
            "best_fvu": best_fvu if best_fvu < float("inf") else None,
            **about,
            "dead_feature_threshold": resolved["dead_feature_threshold"],
            "hookpoints": list(plan.hookpoints),
            "versions": library_versions(),
            "excluded_tokens": plan.source.excluded.tolist(),
            "config": plan.config(),
            "resolved": resolved,
        }
        layers = records(run, self.bank, plan, about, self.fvu)
        # Each rank writes the units that it leads; rank 0 begins and finishes the checkpoint.
        self._on_first(lambda: checkpoint.begin_checkpoint(plan.run_dir, run.step))
        written = self._on_all(lambda: checkpoint.write_layers(plan.run_dir, run.step, layers))
        files = {name: each for part in written if part is not None for name, each in part.items()}
        self._on_first(lambda: self._finish(files, index, improved))
        run.best_fvu = best_fvu
        self.mean_fvus.clear()
        run.checkpoint = checkpoint_folders(plan.run_dir, run.step)[0]
        return run.checkpoint

    def save_last(self) -> Path:
        """Save at the end of a run: like `save`, but try again for up to an hour, if the disk is full for example.

        Collective.

        Raises:
            SaveError: On all ranks, if all tries failed, or the error is one that time does not fix.
            UserError: As `save`.
        """
        until, told = time.monotonic() + PATIENCE, False
        while True:
            try:
                return self.save()
            except SaveError as error:
                left = self.placement.gather(until - time.monotonic())[0]  # all ranks give up at the same try
                if error.lasting or left <= 0:
                    raise
                if not told:
                    self.warn(
                        f"Warning: {error}; trying again every {PAUSE:g} seconds for {PATIENCE / 60:g} minutes, as "
                        f"the trained {self.plan.coder}s are only in memory: free some space (Ctrl-C twice gives up)"
                    )
                told = True
                time.sleep(min(PAUSE, left))

    def _compare_replicas(self) -> None:
        for hookpoint, ranks in self.placement.strays().items():
            whose = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
            raise UserError(
                f"{hookpoint}: the {self.plan.coder} of {whose} differs from that of the other ranks at step "
                f"{self.run.step}, so nothing is saved (processors of different kinds round differently, or one is "
                f"broken). Use processors of one kind or --placement layer-map; {way_on(self.plan.run_dir)}"
            )

    def _finish(self, files: checkpoint.Fingerprints, index: dict[str, Any], improved: bool) -> None:
        plan = self.plan
        folder = checkpoint.finish_checkpoint(plan.run_dir, self.run.step, files, index)
        if plan.cfg.save_best and improved:
            point(plan.run_dir / BEST, folder)
        if self.run.bad_in_row:  # the last step was skipped, so an older checkpoint may be the last good one
            return
        try:
            checkpoint.prune(plan.run_dir, plan.cfg.keep_last)
        except OSError as error:  # the new checkpoint is whole; the next save tries to delete again
            self.warn(f"Warning: an old checkpoint could not be deleted ({_words(error)})")

    def _on_first(self, work: Callable[[], None]) -> None:
        self._on_all(work if self.placement.rank == 0 else lambda: None)

    def _on_all(self, work: Callable[[], Part]) -> list[Part | None]:
        """Do one part of a save on every rank. If one rank fails or refuses, all raise the same error. Collective."""
        result: Part | None = None
        problem: tuple[str, bool] | None = None
        refusal: str | None = None
        try:
            result = work()
        except OSError as error:
            problem = _words(error), isinstance(error, checkpoint.NotHere)
        except UserError as error:
            refusal = str(error)
        outcomes = self.placement.gather((result, problem, refusal))
        problems = [each for _, each, _ in outcomes if each is not None]
        refusals = [each for _, _, each in outcomes if each is not None]
        if problems or refusals:
            self._clean_up()
        if refusals:
            raise UserError(refusals[0])
        if problems:
            before = self.run.checkpoint
            last = f"the previous one, {before}, is whole (--resume)" if before else "there is no earlier one"
            message = f"the checkpoint of step {self.run.step} could not be written ({problems[0][0]}); {last}"
            raise SaveError(message, lasting=any(lasting for _, lasting in problems))
        return [part for part, _, _ in outcomes]

    def _clean_up(self) -> None:
        """Delete the files of a failed save, unless its index is written and only a later part failed."""
        partial = checkpoint_folders(self.plan.run_dir, self.run.step)[1]
        if self.placement.rank == 0 and not (partial / INDEX_FILE).exists():
            with suppress(OSError):  # the disk may be what failed
                discard(partial)


def refuse_other_run(index: dict[str, Any], plan: RunPlan) -> None:
    """Check that a resumed run continues the same training.

    Args:
        index: The checkpoint's index.
        plan: The resumed run.

    Raises:
        UserError: If an option or data that the training depends on has changed. The message lists all options that
            have changed, but no defaults that follow from them.
    """
    config, resolved = plan.config(), plan.resolved()
    known = NOT_YET | index["config"]
    before, now = {**known, **index["resolved"]}, {**config, **resolved}

    def differences(names: Iterable[str]) -> list[str]:
        return [
            f"{_named(name)} was {_shown(before.get(name))} and is {_shown(now.get(name))}"
            for name in sorted(set(names) - HARMLESS)
            if before.get(name) != now.get(name)
        ]

    given = {name for name in (*known, *config) if known.get(name) != config.get(name)}
    changed = differences(given | (resolved.keys() - DERIVED))
    if index["excluded_tokens"] != plan.source.excluded.tolist():
        changed.append("the excluded tokens differ")
    if index["data"].get("cache") != plan.source.cache:  # wherever it is
        changed.append(
            f"--activations {config.get('activations', '(not given)')} has other activations than the run had"
        )
    steps = index["schedule"]["total_steps"]
    if not changed and steps != plan.total_steps:
        changed.append(f"the data gave {steps} steps and now gives {plan.total_steps}")
    if not changed and index["data"]["checksum_of_last_step"] != plan.source.checksum(index["step"] - 1):
        changed.append(f"the data set has other tokens in step {index['step']} than before")
    changed = changed or differences(DERIVED)
    if changed:
        same_shape = all(before.get(name) == now.get(name) for name in ("num_latents", "d_in", "model"))
        start = f" from its {plan.coder}s with --finetune {plan.run_dir}" if same_shape else ""
        raise UserError(
            f"--resume would continue a different training: {'; '.join(changed)}. To train with these options, leave "
            f"out --resume and start a run with another --run-name{start}"
        )


def _words(error: OSError) -> str:
    what = error.strerror or str(error)
    return f"{what}: {error.filename}" if error.filename else what


NAMES = {
    "global_batch": "the global batch (--batch-size × --grad-acc-steps × ranks)",
    "d_in": "the model's width",
    "model": "MODEL",
    "dataset": "DATASET",
}
"""Names in messages for entries that are not command-line options."""


def _named(option: str) -> str:
    return NAMES.get(option, f"--{option.replace('_', '-')}")


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
