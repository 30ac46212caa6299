"""The sparse coder with its files: autoencoder, transcoder, crosscoder."""

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
    """A k-sparse autoencoder (Gao et al. 2024, arXiv 2406.04093, sections 2.1 and 2.3), or a transcoder.

    With `x ∈ R^D`:

        z = select(W_enc (x − b_dec) + b_enc)        about k of M latents are active
        x̂ = W_decᵀ z + b_dec

    A transcoder (Dunefsky et al. 2024, arXiv 2406.11944, section 3) predicts other activations `y ∈ R^D_out`, and so
    does not subtract `b_dec`; with a skip connection (Paulo et al. 2025, arXiv 2501.18823) part of it is linear:

        z = select(W_enc x + b_enc)
        ŷ = W_decᵀ z + b_dec (+ W_skip x)

    A crosscoder (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing") is an
    autoencoder of several hookpoints' activations, one behind the other. How latents are selected is a matter of the
    `selection`: `TopK` of the ReLU by default, see `saekit.sae.selection`.

    Args:
        d_in: D, the width of what it reads.
        num_latents: M, the size of the dictionary.
        k: Active latents per token, at most `num_latents`; for BatchTopK, their mean over many tokens.
        normalize_decoder: Whether the rows of `W_dec` are kept at unit norm while training.
        multi_topk: Whether the forward pass in training also reconstructs from `4k` latents (section 5.4 of the paper).
        selection: Chooses the active latents: the name of a kind (`saekit.registry.SELECTIONS`), or one of its
            instances, which then belongs to this SAE.
        max_norm: The largest norm of activations that the SAE is trained on; None for any. Longer ones, attention
            sinks, are excluded (`counted`); `forward` treats them like others.
        transcode: Whether it predicts something else than it reads.
        d_out: D_out, the width of a transcoder's target; by default D.
        skip_connection: Whether a transcoder has `W_skip`, at first zero.
        max_norm_out: The same as `max_norm` for a transcoder's target.
        reads: D of each hookpoint that it reads, by name, in the order of its columns; empty for the one that its
            folder is named after (a transcoder: that module's input).
        writes: D of each hookpoint that it predicts, in the same way.
        generator: Source of the initial weights; on the CPU, so that they are the same wherever the SAE will live.
        device: Where the parameters live.

    Raises:
        ValueError: If a size is not positive, `max_norm` is negative, the selection cannot have these sizes,
            `multi_topk` is given while the selection has no wider code, or an autoencoder what only a transcoder has.
        UserError: If there is no selection of that name.

    The parameters sit on this module itself (a sharded placement gathers them around `forward`):
    `W_enc [M, D]`, `b_enc [M]`, `W_dec [M, D_out]`, `b_dec [D_out]`, `W_skip [D_out, D]` or None.
    """

    @classmethod
    def load_from_disk(cls, path: str | Path, device: torch.device | str = "cpu") -> Sae:
        """Read one SAE folder, ours or sparsify's, as it is: `saekit.load` also compares a checkpoint's checksums.

        Raises:
            FileNotFoundError: If the folder or one of its two files is not there.
            ValueError: If a file is damaged, describes something else than an autoencoder, or says that latents are
                selected in a way that no package and no plug-in here has registered.
        """
        sizes, tensors = read_folder(path, device)
        return around(tensors, **sizes)

    @classmethod
    def load_many(cls, path: str | Path, device: torch.device | str = "cpu") -> dict[str, Sae]:
        """Read every SAE of a run (its latest checkpoint) or of one checkpoint, by hookpoint, naturally sorted.

        `saekit.load_many` also compares the checkpoint's checksums.
        """
        return {name: cls.load_from_disk(folder, device) for name, folder in find_sae_folders(path).items()}

    @classmethod
    def load_from_hub(
        cls, repo_id: str, hookpoint: str | None = None, device: torch.device | str = "cpu", **kwargs: Any
    ) -> Sae:
        """Download one SAE from the hub.

        Args:
            repo_id: Such as `EleutherAI/sae-llama-3-8b-32x`.
            hookpoint: The folder inside it, such as `layers.3`; None where the repository is a single SAE.
            device: Where the parameters go.
            kwargs: Handed to `huggingface_hub.snapshot_download` (`revision`, `token`, `cache_dir`, ...).
        """
        return cls.load_from_disk(download_folder(repo_id, hookpoint, **kwargs), device)

    def save_to_disk(self, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write `cfg.json` and `sae.safetensors` into the folder `path`, which is made if need be.

        Args:
            path: The folder.
            weights: Whole tensors by parameter name (`W_enc`, ...) where the SAE's own are only a part of them or are
                not the ones to keep; by default the SAE's own.
        """
        write_folder(path, self.sizes(), weights or dict(self.named_parameters()), self.trained_on)


def without_memory(**sizes: Any) -> Sae:
    """Make an SAE of those sizes on torch's meta device: no memory, and no numbers from the global generator."""
    with torch.device("meta"):
        return Sae(**sizes)


def around(tensors: Mapping[str, Tensor], **sizes: Any) -> Sae:
    """Make an SAE of those sizes whose parameters are these tensors, by name; they are not copied."""
    selection = make_selection(sizes.get("selection", "topk"), sizes["k"], sizes["num_latents"])
    sae = without_memory(**{**sizes, "selection": selection})
    sae.load_state_dict(dict(tensors), assign=True)
    sae.selection.to(sae.device)
    return sae
