"""Start a run from earlier coders: check that they fit it, and load their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import Site, site_at, site_of
from saekit.errors import UserError
from saekit.model_files import safetensors_problem
from saekit.placement.costs import Size
from saekit.runs.opening import open_sae
from saekit.sae import Sae
from saekit.sae.decoder import give_encoder_the_norms_
from saekit.sae.entries import read_config
from saekit.sae.storage import CONFIG_FILE, WEIGHTS_FILE, find_sae_folders, folder_name, read_sizes
from saekit.training.frame import Frame
from saekit.training.plan import size_at


class Shape(NamedTuple):
    """What two coders must have in common for one to start from the other."""

    site: Site
    num_latents: int
    """M."""
    skip: bool
    """Whether it has a skip connection."""

    @property
    def size(self) -> Size:
        """Return its size."""
        return size_at(self.site, self.num_latents)

    @classmethod
    def of(cls, name: str, sae: Sae) -> Shape:
        """Return the shape of a coder.

        Args:
            name: The coder's name in the run.
            sae: The coder.

        Raises:
            ValueError: See `site_at`.
        """
        return cls(site_of(name, sae), sae.num_latents, sae.W_skip is not None)

    @classmethod
    def read(cls, name: str, folder: Path) -> Shape:
        """Read the shape of a saved coder, without its weights.

        Args:
            name: The coder's name in the run.
            folder: Where it is saved.

        Raises:
            FileNotFoundError: If there is no `cfg.json`.
            ValueError: If `cfg.json` describes no coder that saekit can compute.
        """
        config = read_config(folder / CONFIG_FILE)
        num_latents, d_in, d_out = read_sizes(folder)
        site = site_at(name, d_in, d_out, config.get("reads", {}), config.get("writes", {}))
        return cls(site, num_latents, bool(config.get("skip_connection")))

    def differs(self, wanted: Shape, *, by_name: bool) -> str | None:
        """Say why a coder of the wanted shape cannot start from a coder of this shape; None if it can.

        Args:
            wanted: The shape of the run's coder.
            by_name: Whether hookpoints must have the same names, too. They need not if the user named the folder of a
                single coder.
        """
        if self.size != wanted.size:
            return f"has {self.size.text()}, this run's has {wanted.size.text()}"
        for does, here, there in (
            ("reads", self.site.reads, wanted.site.reads),
            ("writes", self.site.writes, wanted.site.writes),
        ):
            if here != there if by_name else _widths(here) != _widths(there):
                return f"{does} {_listed(here)}, this run's {does} {_listed(there)}"
        if self.skip and not wanted.skip:
            return "has a skip connection, this run's has none: add --skip-connection"
        return None


def _widths(hookpoints: Sequence[Hookpoint]) -> list[int]:
    return [each.width for each in hookpoints]


def _listed(hookpoints: Sequence[Hookpoint]) -> str:
    return ", ".join(f"{each.name} ({each.width})" for each in hookpoints)


def check_finetune(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Check that the coders to start from exist and fit the run's, without reading their weights.

    Args:
        path: `--finetune`.
        shapes: The shapes of the run's coders, by name.

    Raises:
        UserError: If one is missing, damaged, or of another size or kind.
    """
    for name, wanted in shapes.items():
        folder, by_name = folder_of(path, name, only_unit=len(shapes) == 1)
        try:
            problem = Shape.read(name, folder).differs(wanted, by_name=by_name)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"--finetune {path}: {error}") from error
        if problem is not None:
            raise UserError(f"--finetune {path}: its coder for {name} {problem}")
        if (problem := safetensors_problem(folder / WEIGHTS_FILE)) is not None:
            raise UserError(f"--finetune {path}: {folder_name(name)}/{problem}")


def folder_of(path: Path, name: str, *, only_unit: bool) -> tuple[Path, bool]:
    """Return the folder of a coder to start from, and whether it was found by its name.

    Args:
        path: A run or a checkpoint with coders of the same names. For a bank of one unit also one coder's folder.
        name: The coder's name.
        only_unit: Whether the bank has no other unit.

    Raises:
        UserError: If it is missing.
    """
    if only_unit and (path / WEIGHTS_FILE).is_file():
        return path, False
    folders = sae_folders(path)
    if name not in folders:
        raise UserError(f"--finetune {path} has no coder for {name}, only for {', '.join(folders)}")
    return folders[name], True


def sae_folders(path: Path) -> dict[str, Path]:
    """Find all coders at `--finetune`.

    Raises:
        UserError: If there is none.
    """
    if not path.is_dir():
        hint = "" if path.exists() else ": SAEs on the hub must be downloaded first, with `hf download`"
        raise UserError(f"--finetune {path}: there is no such folder{hint}")
    try:
        return find_sae_folders(path)
    except FileNotFoundError as error:
        raise UserError(f"--finetune {path}: {error}") from error


def load_finetune(path: Path, name: str, sae: Sae, frame: Frame | None, *, only_unit: bool) -> Sae:
    """Replace the weights of a fresh coder by those of an earlier one, in place.

    If the run keeps decoder rows at norm 1 and the earlier coder's rows have other norms, the encoder's rows are
    multiplied by those norms. What an active latent adds to the reconstruction then stays the same until the first
    optimizer step.

    Args:
        path: A run or a checkpoint with coders of the same names. For a bank of one unit also one coder's folder.
        name: The coder's name.
        sae: The fresh coder.
        frame: The frame in which it is trained; None for an SAE.
        only_unit: Whether the bank has no other unit.

    Returns:
        The earlier coder, as it is in its file.

    Raises:
        UserError: If the coder is missing there, is damaged or has another size or kind.
    """
    folder, by_name = folder_of(path, name, only_unit=only_unit)
    try:
        source = open_sae(folder, otherwise="")
        if (problem := Shape.of(name, source).differs(Shape.of(name, sae), by_name=by_name)) is not None:
            raise ValueError(f"its coder for {name} {problem}")
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--finetune {path}: {error}") from error
    weights = source.state_dict()
    if sae.W_skip is not None:  # zeros leave the predictions of an earlier coder without W_skip unchanged
        weights.setdefault("W_skip", torch.zeros_like(sae.W_skip))
    sae.load_state_dict(weights if frame is None else frame.unfold(weights))
    if sae.normalize_decoder:
        give_encoder_the_norms_(sae)
    return source
