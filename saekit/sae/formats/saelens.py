"""One SAE in a folder as SAELens reads it: `cfg.json` and `sae_weights.safetensors` (sae-lens 6).

Names there (M latents, D model width): `W_enc [D, M]`, `b_enc [M]`, `W_dec [M, D]`, `b_dec [D]`, and for its
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
"""The first sae-lens with this format; it takes a configuration without a version for an older one."""
MAX_NORM = "saekit_max_norm"
"""SAELens has no `max_norm`; it is kept under this name in the metadata, which SAELens carries along."""
INPUT = {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
"""The entries of `cfg.json` for an SAE that takes its input as ours do."""
READ = {"architecture": "topk", "rescale_acts_by_decoder_norm": False, **INPUT}
"""Its entries for an SAE that computes what our TopK does."""
UNIT = 1e-3
"""Decoder rows whose norms are this close to 1 were kept at unit norm in training."""


class SaeLens(Format):
    """`cfg.json` and `sae_weights.safetensors`.

    An SAE is written in the architecture that its selection names (`Selection.to_saelens`): TopK is `topk`, BatchTopK
    `jumprelu`. What is written gives the same codes and reconstructions. One thing JumpReLU cannot say: that a token
    has 4k latents at most. Where more are above the threshold, SAELens keeps them all.

    Only `topk` is read, since saekit has no selection that computes the others exactly.
    """

    name: ClassVar[str] = "saelens"
    looks_for: ClassVar[str] = WEIGHTS_FILE

    def recognizes(self, folder: Path) -> bool:
        """Look for `sae_weights.safetensors`, or for a `cfg.json` with the architecture and the size of SAELens."""
        return (folder / WEIGHTS_FILE).is_file() or {"architecture", "d_sae"} <= config_of(folder).keys()

    def read(self, folder: Path, device: torch.device | str = "cpu") -> Sae:
        """Read a `topk` SAE of SAELens, version 6.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            ValueError: If a file is damaged, or describes an SAE that computes something else than TopK does.
        """
        file = folder / CONFIG_FILE
        config = config_of(folder)
        if not config:
            raise ValueError(f"{file} is missing, or holds no JSON object")
        for key, value in READ.items():
            if config.get(key) != value:
                raise ValueError(f"{file} says {key} {config.get(key)!r}; saekit reads {value!r} only")
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
            raise ValueError(f"{file} has no number of at least 0 as {MAX_NORM!r}")
        return around(
            tensors,
            d_in=D,
            num_latents=M,
            k=config["k"],
            # Training would renormalize the rows of an SAE that was trained without that, and so change it.
            normalize_decoder=bool(((tensors["W_dec"].float().norm(dim=1) - 1).abs() < UNIT).all()),
            max_norm=max_norm,
        )

    def write(self, sae: Sae, folder: Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write an SAE for SAELens' `SAE.load_from_disk`.

        Raises:
            ValueError: If SAELens has nothing like its selection, such as GroupMax, it is a transcoder or a crosscoder,
                or the metadata is no plain values.
        """
        _check_kind(sae)
        architecture, more = sae.selection.to_saelens()
        try:
            config = json.dumps(_config(sae, architecture, metadata or {}), indent=2)
        except TypeError as error:
            raise ValueError(f"metadata goes into a JSON file, which cannot hold it ({error})") from None
        tensors: dict[str, Tensor] = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        tensors |= {name: tensor.to(sae.dtype) for name, tensor in more.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")


def _check_kind(sae: Sae) -> None:
    if sae.transcode:
        raise ValueError(
            "SAELens' transcoders keep all positive latents, or those above a threshold, and not this one's: save it "
            "without format, as sparsify reads it"
        )
    if len(sae.reads) > 1:
        raise ValueError(
            f"SAELens has no crosscoders, and this one reads {len(sae.reads)} hookpoints: save it without format"
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
    """Write an SAE in SAELens' format; the same as `saekit.save(sae, folder, format="saelens")`.

    SAELens does not know `max_norm`: what is measured there is of all tokens, attention sinks included.

    Args:
        sae: The SAE.
        folder: Where to; it is made if need be.
        metadata: What SAELens is to know besides, such as `{"model_name": "gpt2", "hook_name":
            "blocks.3.hook_resid_post", "context_size": 1024, "prepend_bos": False}`. That hook of TransformerLens is
            the output of block 3, our `h.3` or `layers.3`. The model must be loaded there as HuggingFace's is
            (`from_pretrained_no_processing`): by default its weights are changed, and with them the residual stream.

    Raises:
        ValueError: If it is no `Sae`, SAELens has nothing like its selection, such as GroupMax, it is a transcoder or a
            crosscoder, or the metadata is no plain values.
    """
    if not isinstance(sae, Sae):
        raise ValueError(f"sae is a {type(sae).__name__}: give an Sae, such as saekit.load returns")
    SaeLens().write(sae, Path(folder), metadata)
