"""What a run would fail on only after its data are tokenized or its model is loaded, found before that."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    from saekit.training.live import InMemory


def check_early(cfg: TrainConfig, run_dir: Path, placement: Placement) -> None:
    """Check what needs neither the model nor the data: the run's folder, and the libraries that it names.

    Raises:
        UserError: If the folder may not be used, a tracker or optimizer is not installed, the kernels
            cannot run on this device, or there is nothing to start from where `finetune` says.
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
    """Check what the names of model and data, and a model's files, already show.

    Args:
        cfg: The run.
        device: Where the model will be.
        have: What the caller has loaded already, whose names lead nowhere.

    Raises:
        UserError: If a path or a file is missing or damaged, or 8 bits are not possible.
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
        UserError: If there is nothing of that name, or something is missing or damaged.
    """
    check_model_name(cfg.model, cfg.revision)
    if is_path(cfg.model):
        check_model_folder(cfg.model, path_of(cfg.model), weights=True)


def check_writable(run_dir: Path) -> None:
    """Check that the folder of a run can be made, or written into if it is there.

    Raises:
        UserError: Naming the folder that does not allow it.
    """
    there = Path(os.path.abspath(run_dir))
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"the run folder {run_dir} cannot be made: {there} is a file; see --save-dir")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise UserError(
            f"the run folder {run_dir} cannot be written ({error.strerror}: {there}): see --save-dir"
        ) from error


def check_units(cfg: RunConfig, placement: Placement, sites: Sequence[Site]) -> None:
    """Check what is said of single SAEs: their sizes, where they start from, and which rank they are on.

    Args:
        cfg: The run.
        placement: The ranks.
        sites: What coders read and write.

    Raises:
        UserError: If a width contradicts the sizes that were asked for, `layer_map` does not fit, or an SAE to start
            from is missing, damaged, or of another size or kind.
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
