"""The sparse coder and its files: autoencoder, transcoder, crosscoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.sae.coder import Coder
from saekit.sae.selection.base import make_selection
from saekit.sae.storage import download_folder, find_sae_folders, read_folder, write_folder


class Sae(Coder):
    """A k-sparse autoencoder (Gao et al. 2024, arXiv 2406.04093, sections 2.1 and 2.3), transcoder or crosscoder.

    With `x ∈ R^D`:

        z = select(W_enc (x − b_dec) + b_enc)        about k of M latents are active
        x̂ = W_decᵀ z + b_dec

    A transcoder (Dunefsky et al. 2024, arXiv 2406.11944, section 3) predicts other activations `y ∈ R^D_out`, so it
    does not subtract `b_dec`. A skip connection (Paulo et al. 2025, arXiv 2501.18823) adds a linear map:

        z = select(W_enc x + b_enc)
        ŷ = W_decᵀ z + b_dec (+ W_skip x)

    A crosscoder (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing") is an
    autoencoder of the concatenated activations of several hookpoints. The `selection` decides which latents are active:
    by default `TopK` of the ReLU. `saekit.sae.selection` has the others.

    Args:
        d_in: D, the width of the input.
        num_latents: M, the size of the dictionary.
        k: Active latents per token, at most `num_latents`. For BatchTopK, their mean over many tokens.
        normalize_decoder: Whether training keeps the rows of `W_dec` at unit norm.
        multi_topk: Whether the forward pass in training also reconstructs from `4k` latents (section 5.4 of the paper).
        selection: Chooses the active latents. The name of a kind (`saekit.registry.SELECTIONS`), or an instance, which
            then belongs to this SAE.
        max_norm: The largest norm of activations that the SAE is trained on. None sets no limit. Tokens with larger
            norms, such as attention sinks, are excluded (`counted`). `forward` treats them like any other.
        transcode: Whether the SAE predicts other activations than it reads.
        d_out: D_out, the width of a transcoder's target. By default D.
        skip_connection: Whether a transcoder has `W_skip`, which starts at zero.
        max_norm_out: Like `max_norm`, for a transcoder's target.
        reads: The width of each hookpoint that it reads, by name, in the order of the input's columns. Empty if it
            reads the hookpoint that its folder is named after (for a transcoder, the input of that module).
        writes: The width of each hookpoint that it predicts, in the same way.
        generator: Draws the initial weights, on the CPU, so that they do not depend on `device`.
        device: Where the parameters go.

    Raises:
        ValueError: If a size is below 1, `max_norm` is negative, the selection does not allow these sizes, `multi_topk`
            is set for a selection without a wider code, or an option for transcoders is set for an autoencoder.
        UserError: If there is no selection of this name.

    The parameters belong to this module itself, since a sharded placement gathers them around `forward`:
    `W_enc [M, D]`, `b_enc [M]`, `W_dec [M, D_out]`, `b_dec [D_out]`, `W_skip [D_out, D]` or None.
    """

    @classmethod
    def load_from_disk(cls, path: str | Path, device: torch.device | str = "cpu") -> Sae:
        """Read one SAE folder, ours or sparsify's. Unlike `saekit.load`, it does not compare a checkpoint's checksums.

        Raises:
            FileNotFoundError: If the folder or one of its two files is missing.
            ValueError: If a file is damaged, does not describe a coder that saekit can compute, or names a selection
                that is not registered.
        """
        sizes, tensors = read_folder(path, device)
        return around(tensors, **sizes)

    @classmethod
    def load_many(cls, path: str | Path, device: torch.device | str = "cpu") -> dict[str, Sae]:
        """Read every SAE of a run (its latest checkpoint) or of one checkpoint, by hookpoint, in natural order.

        Unlike `saekit.load_many`, it does not compare the checkpoint's checksums.
        """
        return {name: cls.load_from_disk(folder, device) for name, folder in find_sae_folders(path).items()}

    @classmethod
    def load_from_hub(
        cls, repo_id: str, hookpoint: str | None = None, device: torch.device | str = "cpu", **kwargs: Any
    ) -> Sae:
        """Download one SAE from the hub.

        Args:
            repo_id: The repository, such as `EleutherAI/sae-llama-3-8b-32x`.
            hookpoint: The folder in the repository, such as `layers.3`. None if the repository is a single SAE.
            device: Where the parameters go.
            kwargs: Passed to `huggingface_hub.snapshot_download` (`revision`, `token`, `cache_dir`, ...).
        """
        return cls.load_from_disk(download_folder(repo_id, hookpoint, **kwargs), device)

    def save_to_disk(self, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write `cfg.json` and `sae.safetensors` into a folder.

        Args:
            path: The folder. Created if it does not exist.
            weights: Whole tensors by parameter name (`W_enc`, ...), to be saved instead of the SAE's own parameters,
                such as those of a sharded SAE.
        """
        write_folder(path, self.sizes(), weights or dict(self.named_parameters()), self.trained_on)


def without_memory(**sizes: Any) -> Sae:
    """Make an SAE of these sizes on torch's meta device. It takes no memory and draws no random numbers."""
    with torch.device("meta"):
        return Sae(**sizes)


def around(tensors: Mapping[str, Tensor], **sizes: Any) -> Sae:
    """Make an SAE of these sizes whose parameters are the given tensors, by name, without copying them."""
    selection = make_selection(sizes.get("selection", "topk"), sizes["k"], sizes["num_latents"])
    sae = without_memory(**{**sizes, "selection": selection})
    sae.load_state_dict(dict(tensors), assign=True)
    sae.selection.to(sae.device)
    return sae
