"""One SAE in a folder: `cfg.json` and `sae.safetensors`, in the format that sparsify and its readers use.

Names there (M latents, D model width): `encoder.weight [M, D]`, `encoder.bias [M]`, `W_dec [M, D]`, `b_dec [D]`.

sparsify has TopK and GroupMax, and knows no BatchTopK. Such an SAE's `cfg.json` has `"activation": "batchtopk"` and its
`"threshold"`: sparsify refuses to read that name, where under the name of TopK it would give other codes.
`saekit.sae.saelens` writes a format that has it. `"max_norm"`, see `Sae`, is ours; sparsify does not look at it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit.sae.model import ACTIVATIONS, Sae, around

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
LATEST = "latest"
"""The link in a run's folder to its latest checkpoint."""
SEARCH_DEPTH = 4
"""Folders below a checkpoint in which SAEs are looked for."""
FILE_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
"""Our parameter names and the file's."""


def sae_config(sae: Sae) -> dict[str, Any]:
    """The content of `cfg.json`."""
    return {
        "activation": sae.activation,
        "expansion_factor": max(1, sae.num_latents // sae.d_in),
        "normalize_decoder": sae.normalize_decoder,
        "num_latents": sae.num_latents,
        "k": sae.k,
        "multi_topk": sae.multi_topk,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        **({} if sae.threshold is None else {"threshold": sae.threshold}),
        **({} if sae.max_norm is None else {"max_norm": sae.max_norm}),
    }


def save_to_disk(sae: Sae, path: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write `cfg.json` and `sae.safetensors` into the folder `path`, which is made if need be.

    Args:
        sae: The SAE, for its sizes.
        path: The folder.
        weights: Whole tensors by parameter name (`W_enc`, ...) where the SAE's own are only a part of them or are not
            the ones to keep; by default the SAE's own.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights if weights is not None else dict(sae.named_parameters())
    renamed = {FILE_NAMES[name]: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(renamed, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(sae_config(sae), indent=2) + "\n", encoding="utf-8")


def load_from_disk(path: str | Path, device: torch.device | str = "cpu") -> Sae:
    """Read one SAE folder, ours or sparsify's.

    Raises:
        FileNotFoundError: If the folder or one of its two files is not there.
        ValueError: If a file is damaged, or holds something that is no TopK, BatchTopK or GroupMax SAE (a
            transcoder, a skip connection).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no SAE folder at {folder}")
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_weights(folder / WEIGHTS_FILE, device)

    num_latents = config.get("num_latents") or config["d_in"] * config.get("expansion_factor", 32)
    shapes = {
        "encoder.weight": (num_latents, config["d_in"]),
        "encoder.bias": (num_latents,),
        "W_dec": (num_latents, config["d_in"]),
        "b_dec": (config["d_in"],),
    }
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{folder / WEIGHTS_FILE} has no tensor {name!r}; it has {', '.join(sorted(tensors))}")
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{folder / WEIGHTS_FILE}: {name} has shape {list(tensors[name].shape)}, "
                f"but {CONFIG_FILE} says {list(shape)}"
            )
    return around(
        {ours: tensors[theirs] for ours, theirs in FILE_NAMES.items()},
        d_in=config["d_in"],
        num_latents=num_latents,
        k=config["k"],
        normalize_decoder=config.get("normalize_decoder", True),
        # Only training looks at it, and only a TopK SAE's; sparsify writes it for others, too.
        multi_topk=config.get("multi_topk", False) and config.get("activation", "topk") == "topk",
        threshold=config["threshold"] if config.get("activation") == "batchtopk" else None,
        groupmax=config.get("activation") == "groupmax",
        max_norm=config.get("max_norm"),
    )


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


def sae_folders_below(checkpoint: Path) -> dict[str, Path]:
    """Find the SAE folders below a checkpoint, by their relative path, naturally sorted; there may be none.

    `layers.2` comes before `layers.10`. Folders whose names begin with a dot are passed over.
    """
    found: dict[str, Path] = {}
    for folder, below, files in os.walk(checkpoint):
        relative = Path(folder).relative_to(checkpoint)
        if WEIGHTS_FILE in files:
            found[relative.as_posix()] = Path(folder)
        if WEIGHTS_FILE in files or len(relative.parts) >= SEARCH_DEPTH:
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]
    # sparsify keeps its best SAEs in a folder inside the checkpoint; they are no further layers.
    if any("/" not in name for name in found):
        found = {name: folder for name, folder in found.items() if not name.startswith("best/")}
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))


def load_many(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Sae]:
    """Read every SAE of a run (its latest checkpoint) or of one checkpoint, by hookpoint, naturally sorted."""
    return {name: load_from_disk(folder, device) for name, folder in find_sae_folders(path).items()}


def load_from_hub(repo_id: str, hookpoint: str | None = None, device: torch.device | str = "cpu", **kwargs: Any) -> Sae:
    """Download one SAE from the hub.

    Args:
        repo_id: Such as `EleutherAI/sae-llama-3-8b-32x`.
        hookpoint: The folder inside it, such as `layers.3`; None where the repository is a single SAE.
        device: Where the parameters go.
        kwargs: Handed to `huggingface_hub.snapshot_download` (`revision`, `token`, `cache_dir`, ...).
    """
    from huggingface_hub import snapshot_download

    pattern = f"{hookpoint}/*" if hookpoint else None
    folder = Path(snapshot_download(repo_id, allow_patterns=pattern, **kwargs))
    return load_from_disk(folder / hookpoint if hookpoint else folder, device)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """A sort key under which numbers inside names count as numbers."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from None
    for key in ("d_in", "k"):
        if not isinstance(config.get(key), int):
            raise ValueError(f"{file} has no whole number {key!r}")
    if config.get("activation", "topk") not in ACTIVATIONS or config.get("signed"):
        raise ValueError(
            f"{file}: activation {config.get('activation')!r} (signed: {config.get('signed')}) is neither TopK nor "
            "BatchTopK nor GroupMax"
        )
    if config.get("max_norm") is not None and not _is_number(config["max_norm"]):
        raise ValueError(f"{file} has no number of at least 0 as 'max_norm'")
    if config.get("activation") == "batchtopk" and not _is_number(config.get("threshold")):
        raise ValueError(f"{file} has no number of at least 0 as 'threshold', which BatchTopK needs")
    if config.get("transcode") or config.get("skip_connection"):
        raise ValueError(f"{file} describes a transcoder; saekit reads autoencoders only")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _read_weights(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        return load_file(file, device=str(device))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); restore it or use another checkpoint") from None
