"""Read and write one SAE's folder, `cfg.json` and `sae.safetensors`, in the format of sparsify.

Tensors in the file (M latents, widths D and D_out): `encoder.weight [M, D]`, `encoder.bias [M]`, `W_dec [M, D_out]`,
`b_dec [D_out]`, and for a skip transcoder `W_skip [D_out, D]`. For an autoencoder D_out is D.

sparsify knows the activations TopK and GroupMax. Other selections are written under their own names, which sparsify
rejects; under the name of TopK it would compute different codes. `Selection.to_config` gives a selection's own entries.
If a plug-in provides the selection, the entry `"plugin"` names its file or package. It is for people to read: saekit
runs no code because of what a folder says. The entries `"max_norm"`, `"max_norm_out"`, `"d_out"`, `"reads"`, `"writes"`
and `"trained_on"` (see `Sae`) are ours, and sparsify ignores them. `saekit.sae.formats` has the other formats.

This module reads and writes plain sizes and tensors. `Sae` makes a module of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saekit.errors import UserError
from saekit.hub import asking_hub, why_not_found
from saekit.registry import SELECTIONS
from saekit.sae.entries import EXPANSION_FACTOR, read_config
from saekit.sae.selection.base import Selection
from saekit.sae.tensors import read_tensors
from saekit.sae.trained_on import TRAINED_ON, TrainedOn

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
LATEST = "latest"
"""The link in a run's folder to its latest checkpoint."""
SEARCH_DEPTH = 4
"""Levels of folders below a checkpoint that are searched for SAEs."""
SEARCH_LIMIT = 10_000
"""The most folders that are searched: a home folder has more, a checkpoint a few hundred."""
FILE_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}
"""Names in the file by our parameter names."""
OF_TRANSCODERS = ("transcode", "d_out", "skip_connection", "max_norm_out", "reads", "writes")
"""Optional entries of `cfg.json` that are passed to `Sae` unchanged."""
IN, IN_FOLDER = ":in", "@in"
"""Suffixes of the hookpoint of a module's input and of its SAE's folder. Windows allows no colon in a file's name."""


def write_folder(
    path: str | Path, sizes: Mapping[str, Any], weights: Mapping[str, Tensor], trained_on: TrainedOn | None = None
) -> None:
    """Write `cfg.json` and `sae.safetensors` into a folder.

    Args:
        path: The folder. Created if it does not exist.
        sizes: The result of `Sae.sizes`.
        weights: Whole tensors by parameter name (`W_enc`, ...).
        trained_on: The model and hookpoint that an SAE saved by itself was trained on, if known. In a checkpoint, other
            files record them.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {FILE_NAMES[name]: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(renamed, folder / WEIGHTS_FILE)
    config = {**_config(sizes), **({} if trained_on is None else {TRAINED_ON: trained_on.entries()})}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `cfg.json`."""
    selection: Selection = sizes["selection"]
    origin, max_norm = SELECTIONS.origin(selection.name), sizes["max_norm"]
    return {
        "activation": selection.name,
        "expansion_factor": max(1, sizes["num_latents"] // sizes["d_in"]),
        "normalize_decoder": sizes["normalize_decoder"],
        "num_latents": sizes["num_latents"],
        "k": sizes["k"],
        "multi_topk": sizes["multi_topk"],
        "skip_connection": sizes.get("skip_connection", False),
        "transcode": sizes.get("transcode", False),
        "d_in": sizes["d_in"],
        **({} if sizes.get("d_out", sizes["d_in"]) == sizes["d_in"] else {"d_out": sizes["d_out"]}),
        **{key: sizes[key] for key in ("reads", "writes") if sizes.get(key)},
        **selection.to_config(),
        **({} if max_norm is None else {"max_norm": max_norm}),
        **({} if sizes.get("max_norm_out") is None else {"max_norm_out": sizes["max_norm_out"]}),
        **({} if origin is None else {"plugin": Path(origin).name}),
    }


def read_folder(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read one SAE folder, ours or sparsify's.

    Returns:
        The arguments of `Sae`, and its weights on the device by parameter name.

    Raises:
        FileNotFoundError: If the folder or one of its two files is missing.
        ValueError: See `Sae.load_from_disk`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no SAE folder {folder}")
    config = read_config(folder / CONFIG_FILE)
    num_latents = _num_latents(config)
    d_in, d_out = config["d_in"], config.get("d_out") or config["d_in"]
    shapes = {
        "encoder.weight": (num_latents, d_in),
        "encoder.bias": (num_latents,),
        "W_dec": (num_latents, d_out),
        "b_dec": (d_out,),
        **({"W_skip": (d_out, d_in)} if config.get("skip_connection") else {}),
    }
    # Tensors that cfg.json does not describe are refused: ignoring them would give a different coder.
    tensors = read_tensors(folder / WEIGHTS_FILE, shapes, device, FILE_NAMES.values() - shapes.keys())
    kind: type[Selection] = SELECTIONS.get(config.get("activation", "topk"))
    try:
        selection = kind.from_config(config["k"], num_latents, config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error
    sizes = {
        "d_in": d_in,
        "num_latents": num_latents,
        "k": config["k"],
        "normalize_decoder": config.get("normalize_decoder", True),
        # sparsify also writes it for activations without a wider code, where it has no effect.
        "multi_topk": config.get("multi_topk", False) and kind.multi_topk,
        "selection": selection,
        "max_norm": config.get("max_norm"),
        **{key: config[key] for key in OF_TRANSCODERS if config.get(key) is not None},
    }
    return sizes, {ours: tensors[theirs] for ours, theirs in FILE_NAMES.items() if theirs in shapes}


def read_sizes(folder: Path) -> tuple[int, int, int | None]:
    """Read M and D of one SAE folder, and a transcoder's D_out (None for other coders).

    Raises:
        FileNotFoundError: If the folder has no `cfg.json`.
        ValueError: If `cfg.json` does not describe a coder that saekit can compute.
    """
    config = read_config(folder / CONFIG_FILE)
    d_in = config["d_in"]
    return _num_latents(config), d_in, config.get("d_out") or d_in if config.get("transcode") else None


def _num_latents(config: Mapping[str, Any]) -> int:
    number: int = config.get("num_latents") or config["d_in"] * config.get("expansion_factor", EXPANSION_FACTOR)
    return number


def find_sae_folders(path: str | Path) -> dict[str, Path]:
    """Find every SAE folder of a run (its latest checkpoint) or of one checkpoint, by hookpoint, in natural order.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(path)
    found = sae_folders_below(folder / LATEST if (folder / LATEST).is_dir() else folder)
    if not found:
        raise FileNotFoundError(f"no SAE in {path}: expected folders such as layers.0/ that contain a {WEIGHTS_FILE}")
    return found


def _has_weights(folder: Path, files: Collection[str]) -> bool:
    return WEIGHTS_FILE in files


def sae_folders_below(
    checkpoint: Path, holds_sae: Callable[[Path, Collection[str]], bool] = _has_weights
) -> dict[str, Path]:
    """Find the SAE folders below a checkpoint, by hookpoint, in natural order. The result may be empty.

    `layers.2` comes before `layers.10`. Links and folders whose names begin with a dot are skipped.

    Args:
        checkpoint: The folder.
        holds_sae: Returns whether a folder with the given files holds an SAE. By default it looks for our format.

    Raises:
        UserError: If there are more than `SEARCH_LIMIT` folders, so that this cannot be a checkpoint.
    """
    found: dict[str, Path] = {}
    seen, level = 0, [checkpoint]
    for depth in range(SEARCH_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            seen += 1
            if seen > SEARCH_LIMIT:
                raise UserError(
                    f"{checkpoint} has more than {SEARCH_LIMIT:,} folders below it, too many to search for SAEs: pass "
                    "a run, one of its checkpoints, or an SAE's folder"
                )
            files, folders = _content(folder)
            if holds_sae(folder, files):
                found[hookpoint_name(folder.relative_to(checkpoint).as_posix())] = folder
            elif depth < SEARCH_DEPTH:
                below += folders
        level = below
    # sparsify also keeps its best SAEs in a folder inside the checkpoint: these are not further layers.
    if any("/" not in name for name in found):
        found = {name: folder for name, folder in found.items() if not name.startswith("best/")}
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))


def folder_name(hookpoint: str) -> str:
    """Return the name of the folder of a hookpoint's SAE: `layers.3.mlp@in` for `layers.3.mlp:in`."""
    return f"{hookpoint.removesuffix(IN)}{IN_FOLDER}" if hookpoint.endswith(IN) else hookpoint


def hookpoint_name(folder: str) -> str:
    """Return the hookpoint of the SAE in a folder, the inverse of `folder_name`. sparsify's suffix `/seed1` stays."""
    own, slash, seed = folder.partition("/")
    return f"{own.removesuffix(IN_FOLDER)}{IN}{slash}{seed}" if own.endswith(IN_FOLDER) else folder


def _content(folder: Path) -> tuple[list[str], list[Path]]:
    """List the names of a folder's files, and its folders. Both are empty if it cannot be read."""
    files: list[str] = []
    folders: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir():
                    files.append(entry.name)
                elif not entry.is_symlink() and not entry.name.startswith("."):
                    folders.append(folder / entry.name)
    except OSError:
        return [], []
    return files, folders


def download_folder(repo_id: str, hookpoint: str | None = None, **kwargs: Any) -> Path:
    """Download one SAE folder from the hub. `Sae.load_from_hub` documents the arguments.

    Raises:
        FileNotFoundError: If the repository is not in the cache, and the hub does not have it or does not answer.
    """
    from huggingface_hub import snapshot_download

    own = folder_name(hookpoint or "")
    only: dict[str, Any] = {"allow_patterns": f"{own}/*"} if hookpoint else {}
    try:
        with asking_hub(repo_id):
            folder = Path(snapshot_download(repo_id, **only, **kwargs))
    except FileNotFoundError as error:  # not in the cache, and the hub was not asked or did not answer
        raise FileNotFoundError(f"{repo_id}: {why_not_found(repo_id)}") from error
    return folder / own if hookpoint else folder


def layer_number(hookpoint: str) -> int | None:
    """Return the number in a hookpoint's path, such as 3 in `layers.3`, `transformer.h.3` or `layers.3.mlp:in`.

    This is the first component of the path that is all digits, or None if there is none. sparsify's suffix `/seed1` of
    a folder's name is ignored.
    """
    path = hookpoint.partition("/")[0].partition(":")[0]
    # No model has 10^9 layers, and int() raises an error for thousands of digits.
    return next((int(part) for part in path.split(".") if part.isascii() and part.isdigit() and len(part) < 10), None)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key for natural order: it compares numbers inside names by length, then by digits."""
    parts = re.split(r"([0-9]+)", name)
    keys = [(part.lstrip("0") if "0" <= part[0] <= "9" else None, part) for part in parts if part]
    return [(1, 0, part) if digits is None else (0, len(digits), digits) for digits, part in keys]
