"""When a run saves: the checkpoint, `latest`, `best`, and what is deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saekit import versions
from saekit.errors import UserError
from saekit.layout import checkpoint_folders
from saekit.placement import Placement
from saekit.report import StepStats
from saekit.training import checkpoint
from saekit.training.plan import RunPlan
from saekit.training.state import RunState, records

HARMLESS = frozenset(
    {"save_every", "save_dir", "keep_last", "save_best", "overwrite", "resume", "log_every", "log_with", "num_proc"}
    | {"micro_acc_steps", "finetune", "run_name", "hf_token"}
    | {"placement", "layer_map", "shard_lm", "batch_size", "grad_acc_steps"}
)
"""Options that a resumed run may change, because the training does not depend on them.

Of the batch only its size over all ranks and micro-batches matters, which `RunPlan.resolved` holds."""


class Saver:
    """Writes the checkpoints of one run and knows which was the best."""

    def __init__(self, plan: RunPlan, placement: Placement, run: RunState) -> None:
        self.plan = plan
        self.placement = placement
        self.run = run
        self.fvu: dict[str, float] = {}
        """By hookpoint, of the last report."""
        self.mean_fvus: list[float] = []
        """Means over layers, of the reports since the last checkpoint."""

    def note(self, stats: StepStats) -> None:
        """Take in a report: `best` is chosen by the FVU between two checkpoints."""
        self.fvu = {name: layer.fvu for name, layer in stats.layers.items()}
        self.mean_fvus.append(stats.mean_fvu)

    def save(self) -> Path:
        """Write a checkpoint of the step that was just finished and return its folder."""
        run, plan = self.run, self.plan
        mean_fvu = sum(self.mean_fvus) / len(self.mean_fvus) if self.mean_fvus else float("inf")
        self.mean_fvus.clear()
        improved = mean_fvu < run.best_fvu
        run.best_fvu = min(run.best_fvu, mean_fvu)
        about = {**plan.about(), "saekit_version": versions.SAEKIT}
        index = {
            "tokens": run.tokens,
            **plan.place(run.step),
            "best_fvu": run.best_fvu if run.best_fvu < float("inf") else None,
            **about,
            "hookpoints": list(plan.hookpoints),
            "versions": versions.libraries(),
            "excluded_tokens": plan.excluded.tolist(),
            "config": plan.config(),
            "resolved": plan.resolved(),
        }
        # All ranks come here. Each writes the layers it speaks for; the first begins and ends.
        first = self.placement.rank == 0
        folder = checkpoint_folders(plan.run_dir, run.step)[0]
        if first:
            checkpoint.begin_checkpoint(plan.run_dir, run.step)
        self.placement.gather(None)
        written = checkpoint.write_layers(plan.run_dir, run.step, records(run, self.placement, about, self.fvu))
        everything = self.placement.gather(written)
        if first:
            files = {name: each for part in everything for name, each in part.items()}
            checkpoint.finish_checkpoint(plan.run_dir, run.step, files, index)
            self._tidy(folder, improved)
        self.placement.gather(None)
        return folder

    def _tidy(self, folder: Path, improved: bool) -> None:
        plan = self.plan
        if plan.cfg.save_best and improved:
            checkpoint.point(plan.run_dir / "best", folder)
        checkpoint.prune(plan.run_dir, plan.cfg.keep_last)


def refuse_other_run(index: dict[str, Any], plan: RunPlan) -> None:
    """See that a resumed run would go on with the same training.

    Raises:
        UserError: If an option that the training depends on has changed; the message lists all that did.
    """
    before, now = {**index["config"], **index["resolved"]}, {**plan.config(), **plan.resolved()}
    changed = [
        f"{_named(name)} was {before.get(name)} and is {now.get(name)}"
        for name in sorted({*before, *now} - HARMLESS)
        if before.get(name) != now.get(name)
    ]
    if index["excluded_tokens"] != plan.excluded.tolist():
        changed.append("the excluded tokens differ")
    steps = index["schedule"]["total_steps"]
    if not changed and steps != plan.total_steps:
        changed.append(f"the data made {steps} steps and makes {plan.total_steps}")
    if not changed and index["data"]["checksum_of_last_step"] != plan.batches.checksum(index["step"] - 1):
        changed.append(f"the data set has other tokens in step {index['step']} than it had then")
    if changed:
        raise UserError(f"--resume would go on with another training: {'; '.join(changed)}")


def _named(option: str) -> str:
    if option == "global_batch":
        return "the global batch (--batch-size × --grad-acc-steps × ranks)"
    return f"--{option.replace('_', '-')}"
