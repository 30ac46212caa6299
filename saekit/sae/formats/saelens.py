"""The format of SAELens (sae-lens 6): a folder with `cfg.json` and `sae_weights.safetensors`.

Tensors in the file (M latents, D model width): `W_enc [D, M]`, `b_enc [M]`, `W_dec [M, D]`, `b_dec [D]`, and for the
architecture `jumprelu` (Rajamanoharan et al. 2024, arXiv 2407.14435) `threshold [M]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from saekit.sae.entries import is_count, is_length
from saekit.sae.formats.base import Format, config_of
from saekit.sae.model import Sae, around
from saekit.sae.storage import CONFIG_FILE
from saekit.sae.tensors import read_tensors

WEIGHTS_FILE = "sae_weights.safetensors"
FORMAT_VERSION = "6.0.0"
"""The first sae-lens version with this format. It treats a configuration without a version as an older format."""
MAX_NORM = "saekit_max_norm"
"""The entry for `max_norm` in the metadata, which SAELens preserves. SAELens has no such limit itself."""
INPUT = {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
"""Entries of `cfg.json` for an SAE that treats its input as ours do."""
READ = {"architecture": "topk", "rescale_acts_by_decoder_norm": False, **INPUT}
"""Entries of `cfg.json` for an SAE that computes the same as our TopK."""
UNIT = 1e-3
"""Decoder rows were kept at unit norm in training if their norms are this close to 1."""


class SaeLens(Format):
    """Reads and writes `cfg.json` and `sae_weights.safetensors`.

    An SAE is written in the architecture that its selection names (`Selection.to_saelens`): TopK as `topk`, BatchTopK
    as `jumprelu`. SAELens then computes the same codes and reconstructions, with one exception: JumpReLU has no limit
    of 4k latents per token. If more are above the threshold, all are active.

    Only `topk` can be read, since no selection of saekit computes the other architectures exactly.
    """

    name: ClassVar[str] = "saelens"
    looks_for: ClassVar[str] = WEIGHTS_FILE

    def recognizes(self, folder: Path) -> bool:
        """Look for `sae_weights.safetensors`, or for a `cfg.json` with SAELens' keys for architecture and size."""
        return (folder / WEIGHTS_FILE).is_file() or {"architecture", "d_sae"} <= config_of(folder).keys()

    def read(self, folder: Path, device: torch.device | str = "cpu") -> Sae:
        """Read a `topk` SAE of SAELens, version 6.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            ValueError: If a file is damaged, or describes an SAE that is not TopK.
        """
        file = folder / CONFIG_FILE
        config = config_of(folder)
        if not config:
            raise ValueError(f"{file} is missing or is not a JSON object")
        for key, value in READ.items():
            if config.get(key) != value:
                raise ValueError(f"{file}: {key} is {config.get(key)!r}, but saekit can read only {value!r}")
        for key in ("d_in", "d_sae", "k"):
            if not is_count(config.get(key)):
                raise ValueError(f"{file} has no whole number {key!r} of at least 1")
        D, M = config["d_in"], config["d_sae"]
        shapes = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,)}
        tensors = read_tensors(folder / WEIGHTS_FILE, shapes, device)
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
        metadata = config.get("metadata")
        max_norm = metadata.get(MAX_NORM) if isinstance(metadata, dict) else None
        if max_norm is not None and not is_length(max_norm):
            raise ValueError(f"{file} has no number {MAX_NORM!r} of at least 0")
        return around(
            tensors,
            d_in=D,
            num_latents=M,
            k=config["k"],
            # If training did not keep the rows at unit norm, renormalizing them would change the SAE.
            normalize_decoder=bool(((tensors["W_dec"].float().norm(dim=1) - 1).abs() < UNIT).all()),
            max_norm=max_norm,
        )

    def write(self, sae: Sae, folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write an SAE for SAELens' `SAE.load_from_disk`.

        Raises:
            ValueError: If SAELens has no architecture for its selection (such as GroupMax), if it is a transcoder or a
                crosscoder, or if the metadata cannot be written as JSON.
        """
        _check_kind(sae)
        architecture, more = sae.selection.to_saelens()
        try:
            config = json.dumps(_config(sae, architecture, metadata or {}), indent=2)
        except TypeError as error:
            raise ValueError(f"the metadata cannot be written as JSON ({error}): pass plain values") from None
        tensors: dict[str, Tensor] = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        tensors |= {name: tensor.to(sae.dtype) for name, tensor in more.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")


def _check_kind(sae: Sae) -> None:
    if sae.transcode:
        raise ValueError(
            "SAELens' transcoders cannot select latents as this one does: save it without format, for sparsify"
        )
    if len(sae.reads) > 1:
        raise ValueError(
            f"SAELens has no crosscoders, but this one reads {len(sae.reads)} hookpoints: save it without format"
        )


def _config(sae: Sae, architecture: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `cfg.json`."""
    own = {"sae_lens_version": FORMAT_VERSION, **({} if sae.max_norm is None else {MAX_NORM: sae.max_norm})}
    return {
        **architecture,
        "d_in": sae.d_in,
        "d_sae": sae.num_latents,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        **INPUT,
        "metadata": {**own, **metadata},
    }


def save_as_saelens(sae: Sae, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an SAE in SAELens' format, like `saekit.save(sae, folder, format="saelens")`.

    SAELens ignores `max_norm`: its measurements include all tokens, attention sinks too.

    Args:
        sae: The SAE.
        folder: Where the files go. Created if it does not exist.
        metadata: Further information for SAELens, such as `{"model_name": "gpt2", "hook_name":
            "blocks.3.hook_resid_post", "context_size": 1024, "prepend_bos": False}`. That hook of TransformerLens is
            the output of block 3, our `h.3` or `layers.3`. Load the model in TransformerLens with
            `from_pretrained_no_processing`: by default it changes the weights, and with them the residual stream.

    Raises:
        ValueError: If `sae` is not an `Sae`, if SAELens has no architecture for its selection (such as GroupMax), if it
            is a transcoder or a crosscoder, or if the metadata cannot be written as JSON.
    """
    if not isinstance(sae, Sae):
        raise ValueError(f"sae is a {type(sae).__name__}: pass an Sae, such as saekit.load returns")
    SaeLens().write(sae, Path(folder), metadata)
