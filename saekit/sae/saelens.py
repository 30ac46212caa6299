"""One SAE in a folder as SAELens reads it: `cfg.json` and `sae_weights.safetensors` (sae-lens 6).

Names there (M latents, D model width): `W_enc [D, M]`, `b_enc [M]`, `W_dec [M, D]`, `b_dec [D]`, and for its
architecture `jumprelu` (Rajamanoharan et al. 2024, arXiv 2407.14435) `threshold [M]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from saekit.sae.model import Sae

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
FORMAT_VERSION = "6.0.0"
"""The first sae-lens with this format; it takes a configuration without a version for an older one."""


def saelens_config(sae: Sae, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of SAELens' `cfg.json`; arguments and errors are those of `save_as_saelens`."""
    architecture, _ = sae.selection.to_saelens()
    return {
        **architecture,
        "d_in": sae.d_in,
        "d_sae": sae.num_latents,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": FORMAT_VERSION, **(metadata or {})},
    }


def save_as_saelens(sae: Sae, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write an SAE for SAELens' `SAE.load_from_disk`, in the architecture that its selection names.

    TopK is `topk`, BatchTopK `jumprelu`. What is written gives the same codes and reconstructions. One thing JumpReLU
    cannot say: that a token has 4k latents at most. Where more are above the threshold, SAELens keeps them all. Nor
    does it know `max_norm`: what is measured there is of all tokens, attention sinks included.

    Args:
        sae: The SAE.
        folder: Where to; it is made if need be.
        metadata: What SAELens is to know besides, such as `{"model_name": "gpt2", "hook_name":
            "blocks.3.hook_resid_post", "context_size": 1024, "prepend_bos": False}`. That hook of TransformerLens is
            the output of block 3, our `h.3` or `layers.3`. The model must be loaded there as HuggingFace's is
            (`from_pretrained_no_processing`): by default its weights are changed, and with them the residual stream.

    Raises:
        ValueError: If SAELens has nothing like its selection, such as GroupMax.
    """
    config = json.dumps(saelens_config(sae, metadata), indent=2)
    tensors: dict[str, Tensor] = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    _, more = sae.selection.to_saelens()
    tensors |= {name: tensor.to(sae.dtype) for name, tensor in more.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: each.detach().cpu().contiguous() for name, each in tensors.items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
