"""Start a run from its configuration: check, load, train."""

from __future__ import annotations

import sys
from pathlib import Path

from saekit.activations import no_bars
from saekit.activations.source import Source
from saekit.config import RunConfig
from saekit.errors import Interrupted
from saekit.placement import Placement, Single, connect
from saekit.placement.failure import one_error
from saekit.placement.launcher import launcher_warnings
from saekit.registry import SOURCES
from saekit.report import Reporter, Reporters, terminal_reporter
from saekit.runs.folder import run_folder, way_on
from saekit.training.early import InMemory, check_early
from saekit.training.plan import default_run_name
from saekit.training.run_folder import one_writer
from saekit.training.trainer import SaeTrainer


def train_from_config(cfg: RunConfig, reporter: Reporter | None = None, have: InMemory | None = None) -> Path:
    """Load what the configuration names, train, and return the folder of the last checkpoint. Collective.

    Cheap checks come first: the run's folder, trackers, the optimizer's library and `finetune`. Then come the model's
    files and config (layers, context), the data, and last the weights.

    Args:
        cfg: The run.
        reporter: Shows the progress of the run. By default, the live view or plain lines.
        have: What the caller has loaded already.

    Raises:
        UserError: If the configuration, the model or the data cannot be used; see `SaeTrainer.fit`.
        SaveError: If a checkpoint cannot be written.
        Interrupted: If the run was asked to stop, once it has saved a checkpoint.
    """
    have = have or InMemory()
    placement = connect(cfg.train.placement, cfg.train.layer_map)
    if have.model is not None and isinstance(placement, Single):
        placement = Single(have.model.device)
    if placement.rank > 0 or not sys.stderr.isatty():
        no_bars()
    run_dir = run_folder(cfg.train, default_run_name(cfg.model.model, cfg))
    with one_error(placement, lambda: way_on(run_dir)):
        watcher: Reporter = (reporter or terminal_reporter()) if placement.rank == 0 else Reporters()
        try:
            with one_writer(cfg.train, run_dir, placement, watcher.status):
                return _train(cfg, placement, watcher, have, run_dir)
        finally:
            watcher.finish()


def _train(cfg: RunConfig, placement: Placement, watcher: Reporter, have: InMemory, run_dir: Path) -> Path:
    train = cfg.train
    for problem in launcher_warnings(train.grace):
        watcher.status(f"Warning: {problem}")
    check_early(train, run_dir, placement)
    placement.check(train)
    name = train.source if train.activations is None else "cached"
    source: Source = SOURCES.get(name)(cfg, placement, watcher.status, have)
    trainer = SaeTrainer(train, source=source, run=cfg, reporter=watcher, placement=placement)
    try:
        last = trainer.fit()
    except Interrupted:
        placement.close()
        raise
    placement.close()
    return last
