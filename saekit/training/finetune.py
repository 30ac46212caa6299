"""What a run starts from: whether earlier coders are of its own kind and size, and their weights as it trains them."""

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
    """What two coders must have in common for one to go on from the other."""

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
        """Return that of a coder by the name that it goes by.

        Raises:
            ValueError: See `site_at`.
        """
        return cls(site_of(name, sae), sae.num_latents, sae.W_skip is not None)

    @classmethod
    def read(cls, name: str, folder: Path) -> Shape:
        """Read that of a saved coder, without its weights.

        Raises:
            FileNotFoundError: If there is no `cfg.json`.
            ValueError: If that describes no coder that saekit can compute.
        """
        config = read_config(folder / CONFIG_FILE)
        num_latents, d_in, d_out = read_sizes(folder)
        site = site_at(name, d_in, d_out, config.get("reads", {}), config.get("writes", {}))
        return cls(site, num_latents, bool(config.get("skip_connection")))

    def differs(self, wanted: Shape, *, by_name: bool) -> str | None:
        """Say why a coder that has another shape cannot go on from this one; None if it can.

        Args:
            wanted: The other's.
            by_name: Whether hookpoints must have the same names, too: not where the user named one coder's folder.
        """
        if self.size != wanted.size:
            return f"has {self.size.text()}, this run's {wanted.size.text()}"
        for does, here, there in (
            ("reads", self.site.reads, wanted.site.reads),
            ("writes", self.site.writes, wanted.site.writes),
        ):
            if here != there if by_name else _widths(here) != _widths(there):
                return f"{does} {_listed(here)}, this run's {_listed(there)}"
        if self.skip and not wanted.skip:
            return "has a skip connection, this run's has none: give --skip-connection"
        return None


def _widths(hookpoints: Sequence[Hookpoint]) -> list[int]:
    return [each.width for each in hookpoints]


def _listed(hookpoints: Sequence[Hookpoint]) -> str:
    return ", ".join(f"{each.name} ({each.width})" for each in hookpoints)


def check_finetune(path: Path, shapes: Mapping[str, Shape]) -> None:
    """Check that the coders to start from are there and are like the run's, without reading their weights.

    Args:
        path: `--finetune`.
        shapes: Of the run's coders by name.

    Raises:
        UserError: If one is missing, damaged, of another size or of another kind.
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
    """Find the folder of a coder to start from, and tell whether it was found by its name.

    Args:
        path: A run or a checkpoint with coders of the same names, or, for a bank of one unit, one coder's folder.
        name: The coder's.
        only_unit: Whether the bank has no other unit.

    Raises:
        UserError: If it is missing.
    """
    if only_unit and (path / WEIGHTS_FILE).is_file():
        return path, False
    folders = sae_folders(path)
    if name not in folders:
        raise UserError(f"--finetune {path}: it has no coder for {name}, only for {', '.join(folders)}")
    return folders[name], True


def sae_folders(path: Path) -> dict[str, Path]:
    """Find all coders at `--finetune`.

    Raises:
        UserError: If there is none.
    """
    if not path.is_dir():
        hint = "" if path.exists() else " (SAEs on the hub have to be downloaded first, with `hf download`)"
        raise UserError(f"--finetune {path}: there is no such folder{hint}")
    try:
        return find_sae_folders(path)
    except FileNotFoundError as error:
        raise UserError(f"--finetune {path}: {error}") from error


def load_finetune(path: Path, name: str, sae: Sae, frame: Frame | None, *, only_unit: bool) -> Sae:
    """Replace the weights of a fresh coder by those of an earlier one, in place.

    Where decoder rows are kept at norm 1 and the earlier one's are not, the encoder takes their lengths: what a chosen
    latent adds to the reconstruction then stays the same until the first optimizer step.

    Args:
        path: A run or a checkpoint with coders of the same names, or, for a bank of one unit, one coder's folder.
        name: The coder's.
        sae: The fresh one.
        frame: In which it is trained.
        only_unit: Whether the bank has no other unit.

    Returns:
        The earlier one, as it is in its file.

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
    if sae.W_skip is not None:  # one that had none goes on as it was
        weights.setdefault("W_skip", torch.zeros_like(sae.W_skip))
    sae.load_state_dict(weights if frame is None else frame.unfold(weights))
    if sae.normalize_decoder:
        give_encoder_the_norms_(sae)
    return source
