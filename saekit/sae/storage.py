"""One SAE in a folder: `cfg.json` and `sae.safetensors`, in the format that sparsify and its readers use.

Names there (M latents, widths D and D_out): `encoder.weight [M, D]`, `encoder.bias [M]`, `W_dec [M, D_out]`, `b_dec
[D_out]`; of a skip transcoder `W_skip [D_out, D]`. For an autoencoder D_out is D.

sparsify has TopK and GroupMax, and reads no other `"activation"`: it refuses the name of another kind, where under the
name of TopK it would give other codes. The kind's own entries are its `to_config`; where it comes from outside this
package, `"plugin"` says from which file or package, for people to read: what a folder says never runs code.
`saekit.sae.formats` has the other formats. `"max_norm"`, `"max_norm_out"`, `"d_out"`, `"reads"`, `"writes"` and
`"trained_on"`, see `Sae`, are ours; sparsify does not look at them.

What is read and written here are plain sizes and tensors; `Sae` makes a module of them.
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
"""Folders below a checkpoint in which SAEs are looked for."""
SEARCH_LIMIT = 10_000
"""Folders that are looked at for that: a home folder has more, a checkpoint a few hundred."""
FILE_NAMES = {
    "W_enc": "encoder.weight",
    "b_enc": "encoder.bias",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}
"""Our parameter names and the file's."""
OF_TRANSCODERS = ("transcode", "d_out", "skip_connection", "max_norm_out", "reads", "writes")
"""Entries of `cfg.json` that are arguments of `Sae` as they are, where they are there."""
IN, IN_FOLDER = ":in", "@in"
"""The end of the name of a module's input, and of its SAE's folder: Windows allows no colon in a file's name."""


def write_folder(
    path: str | Path, sizes: Mapping[str, Any], weights: Mapping[str, Tensor], trained_on: TrainedOn | None = None
) -> None:
    """Write `cfg.json` and `sae.safetensors` into a folder, which is made if need be.

    Args:
        path: The folder.
        sizes: What `Sae.sizes` gives.
        weights: Whole tensors by parameter name (`W_enc`, ...).
        trained_on: What an SAE that is saved by itself was trained on, if that is known; in a checkpoint, other files
            say so.
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
        FileNotFoundError: If the folder or one of its two files is not there.
        ValueError: See `Sae.load_from_disk`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no SAE folder at {folder}")
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
    # A coder with a part of its files ignored would be another one.
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
        # Only training looks at it, and only where there is a wider code; sparsify writes it for others, too.
        "multi_topk": config.get("multi_topk", False) and kind.multi_topk,
        "selection": selection,
        "max_norm": config.get("max_norm"),
        **{key: config[key] for key in OF_TRANSCODERS if config.get(key) is not None},
    }
    return sizes, {ours: tensors[theirs] for ours, theirs in FILE_NAMES.items() if theirs in shapes}


def read_sizes(folder: Path) -> tuple[int, int, int | None]:
    """Read M and D of one SAE folder, and D_out if it has a transcoder's.

    Raises:
        FileNotFoundError: If it has no `cfg.json`.
        ValueError: If that describes no SAE that saekit can compute.
    """
    config = read_config(folder / CONFIG_FILE)
    d_in = config["d_in"]
    return _num_latents(config), d_in, config.get("d_out") or d_in if config.get("transcode") else None


def _num_latents(config: Mapping[str, Any]) -> int:
    number: int = config.get("num_latents") or config["d_in"] * config.get("expansion_factor", EXPANSION_FACTOR)
    return number


def find_sae_folders(path: str | Path) -> dict[str, Path]:
    """Find every SAE folder of a run (its latest checkpoint) or of one checkpoint, by hookpoint, naturally sorted.

    Raises:
        FileNotFoundError: If there is none.
    """
    folder = Path(path)
    found = sae_folders_below(folder / LATEST if (folder / LATEST).is_dir() else folder)
    if not found:
        raise FileNotFoundError(f"no SAE in {path}: expected folders such as layers.0/ with a {WEIGHTS_FILE} in them")
    return found


def _has_weights(folder: Path, files: Collection[str]) -> bool:
    return WEIGHTS_FILE in files


def sae_folders_below(
    checkpoint: Path, holds_sae: Callable[[Path, Collection[str]], bool] = _has_weights
) -> dict[str, Path]:
    """Find the SAE folders below a checkpoint, by hookpoint, naturally sorted; there may be none.

    `layers.2` comes before `layers.10`. Folders whose names begin with a dot are passed over, and so are links.

    Args:
        checkpoint: The folder.
        holds_sae: Tells whether a folder with these files holds an SAE; by default one in our format.

    Raises:
        UserError: If there are more than `SEARCH_LIMIT` folders: this is no checkpoint.
    """
    found: dict[str, Path] = {}
    seen, level = 0, [checkpoint]
    for depth in range(SEARCH_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            seen += 1
            if seen > SEARCH_LIMIT:
                raise UserError(
                    f"{checkpoint} has more than {SEARCH_LIMIT:,} folders below it, too many to look for SAEs in: give "
                    "a run, one of its checkpoints, or an SAE's folder"
                )
            files, folders = _content(folder)
            if holds_sae(folder, files):
                found[hookpoint_name(folder.relative_to(checkpoint).as_posix())] = folder
            elif depth < SEARCH_DEPTH:
                below += folders
        level = below
    # sparsify keeps its best SAEs in a folder inside the checkpoint; they are no further layers.
    if any("/" not in name for name in found):
        found = {name: folder for name, folder in found.items() if not name.startswith("best/")}
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))


def folder_name(hookpoint: str) -> str:
    """Return the name of the folder that a hookpoint's SAE is in: `layers.3.mlp@in` for `layers.3.mlp:in`."""
    return f"{hookpoint.removesuffix(IN)}{IN_FOLDER}" if hookpoint.endswith(IN) else hookpoint


def hookpoint_name(folder: str) -> str:
    """Return the hookpoint whose SAE is in a folder, the inverse of `folder_name`; sparsify's `/seed1` stays."""
    own, slash, seed = folder.partition("/")
    return f"{own.removesuffix(IN_FOLDER)}{IN}{slash}{seed}" if own.endswith(IN_FOLDER) else folder


def _content(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the names of a folder's files, and its folders; neither of one that cannot be read."""
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
    """Download one SAE folder from the hub; the arguments are `Sae.load_from_hub`'s."""
    from huggingface_hub import snapshot_download

    own = folder_name(hookpoint or "")
    only: dict[str, Any] = {"allow_patterns": f"{own}/*"} if hookpoint else {}
    try:
        with asking_hub(repo_id):
            folder = Path(snapshot_download(repo_id, **only, **kwargs))
    except FileNotFoundError as error:  # it is not in the cache, and the hub was not asked or did not answer
        raise FileNotFoundError(f"{repo_id}: {why_not_found(repo_id)}") from error
    return folder / own if hookpoint else folder


def layer_number(hookpoint: str) -> int | None:
    """Return the number in a hookpoint's path, such as 3 in `layers.3`, `transformer.h.3` or `layers.3.mlp:in`.

    It is the first part of the path that is all digits; None where there is none. sparsify's `/seed1` at the end of a
    folder's name is no part of the path.
    """
    path = hookpoint.partition("/")[0].partition(":")[0]
    # No model has 10^9 layers, and Python makes no number of thousands of digits.
    return next((int(part) for part in path.split(".") if part.isascii() and part.isdigit() and len(part) < 10), None)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key under which numbers inside names count as numbers: by their length, then by their digits."""
    parts = re.split(r"([0-9]+)", name)
    keys = [(part.lstrip("0") if "0" <= part[0] <= "9" else None, part) for part in parts if part]
    return [(1, 0, part) if digits is None else (0, len(digits), digits) for digits, part in keys]
