"""Hands the numbers to Weights & Biases, TensorBoard, Trackio, ... through accelerate's trackers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saekit.errors import UserError
from saekit.report.stats import EvalStats, RunInfo, StepStats

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrackerReporter:
    """Logs every report to the trackers that `accelerator` was made with (`Accelerator(log_with=...)`).

    Metric names are flat, `fvu/layers.0`, so that a tracker puts one chart's worth of layers under one heading.

    Args:
        accelerator: Accelerate's object; trackers run on its main process only.
        project_name: What the trackers file the run under.
    """

    def __init__(self, accelerator: Accelerator, project_name: str) -> None:
        self._accelerator = accelerator
        self._project_name = project_name
        self._running = False

    def status(self, message: str) -> None:
        """Nothing: trackers take numbers."""

    def start(self, info: RunInfo) -> None:
        """Open the trackers and store the configuration."""
        try:
            self._accelerator.init_trackers(self._project_name, config=flat_config(info.config))
        except Exception as error:  # each tracker has its own errors: no login, no network, a bad setting
            raise UserError(f"--log-with: the tracker did not start ({error})") from error
        self._running = True

    def step(self, stats: StepStats) -> None:
        """Log one report under its step."""
        self._accelerator.log(metrics(stats), step=stats.step)

    def evaluated(self, stats: EvalStats) -> None:
        """Log an evaluation under its step."""
        self._accelerator.log(evaluation_metrics(stats), step=stats.step)

    def saved(self, path: Path, step: int) -> None:
        """Nothing: uploading checkpoints is left to the user."""

    def finish(self) -> None:
        """Close the trackers.

        `Accelerator.end_training` would do so too, but it also destroys the process group, which other ranks may
        still be using; a reporter changes nothing.
        """
        if self._running:
            self._running = False
            for tracker in self._accelerator.trackers:
                tracker.finish()


def metrics(stats: StepStats) -> dict[str, float | int]:
    """One report as flat names: run-wide numbers, means over the layers, and `name/hookpoint` per layer."""
    layers = stats.layers
    flat: dict[str, float | int] = {
        "tokens": stats.tokens,
        "tokens_per_second": stats.tokens_per_second,
        "learning_rate": stats.learning_rate,
        "memory_bytes": stats.memory_bytes,
    }
    if layers:
        flat["fvu_mean"] = stats.mean_fvu
        flat["dead_pct_mean"] = 100 * sum(layer.dead_fraction for layer in layers.values()) / len(layers)
    for hookpoint, layer in layers.items():
        flat[f"fvu/{hookpoint}"] = layer.fvu
        flat[f"dead_pct/{hookpoint}"] = 100 * layer.dead_fraction
        flat[f"l0/{hookpoint}"] = layer.l0
        flat[f"loss/{hookpoint}"] = layer.loss
        flat[f"auxk/{hookpoint}"] = layer.auxk_loss
        flat[f"too_long/{hookpoint}"] = layer.too_long
        if layer.multi_topk_fvu is not None:
            flat[f"multi_topk_fvu/{hookpoint}"] = layer.multi_topk_fvu
    return flat


EVALUATED = ("fvu", "explained_variance", "cosine", "l0")
GRAFTED = ("ce", "ce_mean_ablated", "ce_zero_ablated", "ce_recovered", "ce_recovered_from_mean", "kl", "top1")


def evaluation_metrics(stats: EvalStats) -> dict[str, float]:
    """One evaluation as flat names: `eval/name/hookpoint`, and `eval/name/all` with all layers replaced at once."""
    flat = {f"eval/{number}/{name}": value for number in EVALUATED for name, value in stats.of_layers(number).items()}
    flat |= {f"eval/dead_pct/{name}": 100 * share for name, share in stats.of_layers("dead_fraction").items()}
    if stats.ce_clean is None:
        return flat
    flat["eval/ce_clean"] = stats.ce_clean
    for number in GRAFTED:
        flat |= {f"eval/{number}/{name}": value for name, value in stats.of_layers(number).items()}
        if (together := stats.together(number)) is not None:
            flat[f"eval/{number}/all"] = together
    return flat


def flat_config(config: Mapping[str, object], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return a nested configuration as `section.option` → scalar or string, which is all that every tracker takes."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flat_config(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, Sequence):
            flat[f"{prefix}{key}"] = ", ".join(map(str, value))
        else:
            # TensorBoard's hparams refuse None
            flat[f"{prefix}{key}"] = str(value)
    return flat


def check_tracker(name: str) -> None:
    """Check that accelerate has a tracker of that name, that its package is installed, and that it needs no login yet.

    Only Weights & Biases is asked for its login, without its network: others have none, or do not tell.

    Raises:
        UserError: If not.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(kind) for kind in LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise UserError(f"--log-with {name!r}: there is no such tracker; accelerate has {', '.join(known)}")
    if name not in map(str, get_available_trackers()):
        raise UserError(f"--log-with {name}: its package is not installed: pip install {name}")
    if name == "wandb" and not _wandb_is_ready():
        raise UserError(
            "--log-with wandb: you are not logged in: run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline "
            "and upload the run later with `wandb sync`"
        )


def _wandb_is_ready() -> bool:
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return True
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return wandb.api.api_key is not None  # versions before `prompt`


def tracker_reporter(name: str, run_dir: Path) -> TrackerReporter:
    """Return a reporter for one of accelerate's trackers.

    Args:
        name: As accelerate knows it: `wandb`, `tensorboard`, ...
        run_dir: The run's folder; trackers that write files put them into its folder `trackers`.

    Raises:
        UserError: If there is no such tracker, or its package is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import LoggerType

    check_tracker(name)
    accelerator = Accelerator(log_with=LoggerType(name), project_dir=run_dir / "trackers")
    return TrackerReporter(accelerator, run_dir.name)
