"""Early checks: find what would fail a run later, before data is tokenized or the model is loaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saekit.activations import check_device
from saekit.activations.sites import Site
from saekit.config import ModelConfig, RunConfig, TrainConfig
from saekit.errors import UserError
from saekit.hub import check_data_name, check_model_name, is_path, path_of
from saekit.model_files import check_model_folder
from saekit.placement import Placement
from saekit.report import check_tracker
from saekit.runs.folder import check_run_folder, goes_on, run_folder
from saekit.sae.kernels import choose_kernels
from saekit.training.finetune import Shape, check_finetune, sae_folders
from saekit.training.optimizers import check_optimizer, import_bitsandbytes
from saekit.training.plan import costs_of, default_run_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class InMemory:
    """Objects that the caller has loaded already. The configuration holds only names for them."""

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    """That model's tokenizer. None: loaded from where the model was loaded from."""
    rows: Any = None
    """The data to train on, see `saekit.data.load.rows_in_memory`."""
    eval_rows: Any = None
    """The data to evaluate on every `eval_every` steps."""
    other_model: PreTrainedModel | None = None
    """The second model, for crosscoders of two models."""
    other_tokenizer: PreTrainedTokenizerBase | None = None
    """The second model's tokenizer. None: as for the first model."""


def check_early(cfg: TrainConfig, run_dir: Path, placement: Placement) -> None:
    """Check what needs neither the model nor the data: the run's folder, libraries, kernels and `finetune`.

    Raises:
        UserError: If the folder may not be used, a tracker or optimizer is not installed, the kernels
            cannot run on this device, or the folder of `finetune` holds no coder.
    """
    if placement.rank == 0:
        check_run_folder(cfg, run_dir)
        if cfg.log_with is not None:
            check_tracker(cfg.log_with)
    check_optimizer(cfg)
    if cfg.kernels != "auto":
        try:
            choose_kernels(cfg.kernels, cfg.select_dtype, placement.device)
        except ValueError as error:
            raise UserError(str(error)) from None
    if cfg.finetune is not None and not goes_on(cfg, run_dir):
        sae_folders(cfg.finetune)


def check_inputs(cfg: RunConfig, device: torch.device, have: InMemory) -> None:
    """Check the names of the model and the data, and the files of a local model.

    Args:
        cfg: The run.
        device: Where the model will be.
        have: What the caller has loaded already. Its names need not be paths or on the hub.

    Raises:
        UserError: If a path or a file is missing or damaged, or the model cannot be loaded in 8 bits.
    """
    check_device(cfg.model, device)
    for model, loaded in ((cfg.model, have.model), (cfg.other_model, have.other_model)):
        if model is not None and loaded is None:
            check_model(model)
            if model.load_in_8bit:
                import_bitsandbytes("--load-in-8bit", "leave it out")
    if have.rows is None:
        check_data_name(cfg.data.dataset)
    if have.eval_rows is None and cfg.train.eval_every is not None and cfg.data.eval_dataset is not None:
        check_data_name(cfg.data.eval_dataset)


def check_model(cfg: ModelConfig) -> None:
    """Check a model's name and, if it is a folder, its files.

    Raises:
        UserError: If there is no model of that name, or one of its files is missing or damaged.
    """
    check_model_name(cfg.model, cfg.revision)
    if is_path(cfg.model):
        check_model_folder(cfg.model, path_of(cfg.model), weights=True)


def check_writable(run_dir: Path) -> None:
    """Check that the folder of a run can be made, or written to if it exists.

    Raises:
        UserError: If it cannot. The message names the folder that prevents it.
    """
    there = Path(os.path.abspath(run_dir))
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"cannot make the run folder {run_dir}, because {there} is a file: choose another --save-dir")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {run_dir} ({error.strerror}: {there}): choose another --save-dir"
        ) from error


def check_units(cfg: RunConfig, placement: Placement, sites: Sequence[Site]) -> None:
    """Check each coder: its sizes, what it starts from, and the rank that it is on.

    Args:
        cfg: The run.
        placement: The ranks.
        sites: What the coders read and write.

    Raises:
        UserError: If the requested sizes do not fit a width, `layer_map` does not fit the sites, or a coder of
            `finetune` is missing, damaged, or of another size or kind.
    """
    train = cfg.train
    try:
        latents = [train.sae.resolve_num_latents(each.d_in) for each in sites]
        shapes = {
            each.name: Shape(each, number, train.sae.skip_connection)
            for each, number in zip(sites, latents, strict=True)
        }
    except ValueError as error:
        raise UserError(str(error)) from None
    goes = goes_on(train, run_folder(train, default_run_name(cfg.model.model, cfg)))
    finetune = None if goes else train.finetune
    costs = costs_of({name: each.size for name, each in shapes.items()})
    placement.holds(placement.rank, costs, placement.world_size, train.layer_map)
    if finetune is not None:
        check_finetune(finetune, shapes)
