"""The k-sparse autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saekit.sae.kernels import Kernels, default_kernels
from saekit.sae.kernels.eager import unit_rows
from saekit.sae.output import Encoded, SaeOutput, check_code, described
from saekit.sae.selection.base import Selection, make_selection
from saekit.sae.storage import download_folder, find_sae_folders, read_folder, write_folder
from saekit.sae.trained_on import TrainedOn


class Sae(nn.Module):
    """A k-sparse autoencoder (Gao et al. 2024, arXiv 2406.04093, sections 2.1 and 2.3).

    With `x ∈ R^D`:

        z = select(W_enc (x − b_dec) + b_enc)        about k of M latents are active
        x̂ = W_decᵀ z + b_dec

    How latents are selected is a matter of its `selection`: `TopK` of the ReLU by default, see `saekit.sae.selection`.

    Args:
        d_in: D, the width of the residual stream.
        num_latents: M, the size of the dictionary.
        k: Active latents per token, at most `num_latents`; for BatchTopK, their mean over many tokens.
        normalize_decoder: Whether the rows of `W_dec` are kept at unit norm while training.
        multi_topk: Whether the forward pass in training also reconstructs from `4k` latents (section 5.4 of the paper).
        selection: Chooses the active latents: the name of a kind (`saekit.registry.SELECTIONS`), or one of its
            instances, which then belongs to this SAE.
        max_norm: The largest norm of activations that the SAE is trained on; None for any. Longer ones, attention
            sinks, are excluded (`counted`); `forward` treats them like others.
        generator: Source of the initial weights; on the CPU, so that they are the same wherever the SAE will live.
        device: Where the parameters live.

    Raises:
        ValueError: If a size is not positive, `max_norm` is negative, the selection cannot have these sizes, or
            `multi_topk` is given while the selection has no wider code.
        UserError: If there is no selection of that name.

    The parameters sit on this module itself (a sharded placement gathers them around `forward`):
    `W_enc [M, D]`, `b_enc [M]`, `W_dec [M, D]`, `b_dec [D]`.
    """

    def __init__(
        self,
        d_in: int,
        num_latents: int,
        k: int,
        *,
        normalize_decoder: bool = True,
        multi_topk: bool = False,
        selection: str | Selection = "topk",
        max_norm: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if d_in < 1 or num_latents < 1 or k < 1:
            raise ValueError(f"d_in, num_latents and k must be positive, got {d_in}, {num_latents} and {k}")
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"max_norm must be at least 0, got {max_norm}")
        self.selection = make_selection(selection, k, num_latents)
        if multi_topk and not self.selection.multi_topk:
            raise ValueError(f"multi_topk is for topk: {self.activation} has no code at 4k")
        self.d_in = d_in
        self.num_latents = num_latents
        self.k = k
        self.normalize_decoder = normalize_decoder
        self.multi_topk = multi_topk
        self.max_norm = max_norm
        self.trained_on: TrainedOn | None = None
        """Set by `saekit.load`: the language model and the hookpoint, where the files say so."""
        self.chosen_kernels: Kernels | None = None
        self.prefixes: tuple[int, ...] = ()
        """Of a Matryoshka SAE in training: numbers of latents, ascending, the last one M."""
        # U(−1/√D, 1/√D), the field's usual start for a linear layer; the decoder is its transpose with unit rows.
        W_MD = torch.empty(num_latents, d_in).uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
        self.W_enc = nn.Parameter(W_MD.to(device))
        self.b_enc = nn.Parameter(torch.zeros(num_latents, device=device))
        self.W_dec = nn.Parameter(unit_rows(W_MD).to(device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device))
        if device is not None:
            self.selection.to(device)

    def sizes(self) -> dict[str, Any]:
        """Return the arguments that make another SAE of the same shape, with a copy of the selection's state."""
        return {
            "d_in": self.d_in,
            "num_latents": self.num_latents,
            "k": self.k,
            "normalize_decoder": self.normalize_decoder,
            "multi_topk": self.multi_topk,
            "selection": self.selection.clone(),
            "max_norm": self.max_norm,
        }

    def extra_repr(self) -> str:
        """Sizes, for `print(sae)`."""
        limit = "" if self.max_norm is None else f", max_norm={self.max_norm:.6g}"
        return f"d_in={self.d_in}, num_latents={self.num_latents}, k={self.k}, {self.selection!r}{limit}"

    def _apply(self, *args: Any, **kwargs: Any) -> Sae:
        """Move the selection's state along with the parameters, whose type it does not share."""
        super()._apply(*args, **kwargs)
        self.selection.to(self.device)
        return self

    @property
    def activation(self) -> str:
        """Return the selection's name."""
        return self.selection.name

    @property
    def max_active(self) -> int:
        """K, the most latents that a token can have."""
        return self.selection.max_active

    @property
    def device(self) -> torch.device:
        """Return where the parameters are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the parameters' type; inputs are cast to it."""
        return self.W_enc.dtype

    @property
    def kernels(self) -> Kernels:
        """Return the kernels of this SAE: `chosen_kernels` if set, else the fastest exact ones of its device."""
        return self.chosen_kernels or default_kernels(self.device.type)

    def encode(self, x: Tensor) -> Encoded:
        """Encode `x`, `[..., D]` → two tensors `[..., K]`, the sparse code.

        Raises:
            ValueError: If `x` has another width than D.
        """
        acts_NK, indices_NK = self.selection.encode(self._flat(x), self.W_enc, self.b_enc, self.b_dec, self.kernels)
        shape = (*x.shape[:-1], self.max_active)
        return Encoded(acts_NK.view(shape), indices_NK.view(shape))

    def counted(self, x: Tensor) -> Tensor:
        """Tell which activations `[..., D]` are counted: bool `[...]`, False for norms above `max_norm`.

        NaN is counted, so that it shows.
        """
        if self.max_norm is None:
            return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        return ~(x.float().norm(dim=-1) > self.max_norm)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Reconstruct the counted activations `[..., D]`; excluded ones stay as they are."""
        return torch.where(self.counted(x)[..., None], self(x).recon.to(x.dtype), x)

    def decode(self, acts: Tensor, indices: Tensor) -> Tensor:
        """Decode a code, two tensors `[..., K]` → the reconstruction `[..., D]`. Any `K` will do.

        Raises:
            ValueError: If the two do not fit each other, or (on a CPU, where looking is free) a latent is none of M.
        """
        check_code(acts, indices, self.num_latents)
        k = acts.shape[-1]
        out_ND = self.kernels.decode(acts.reshape(-1, k), indices.reshape(-1, k), self.W_dec) + self.b_dec
        return out_ND.view(*acts.shape[:-1], self.d_in)

    def forward(self, x: Tensor, dead: Tensor | None = None, *, aux: Tensor | None = None) -> SaeOutput:
        """Encode and decode, with what the auxiliary losses need.

        Args:
            x: `[..., D]`, residual-stream activations as the language model gives them, in any float type.
            dead: Which latents are dead, bool `[M]`, for the loss that raises their biases; None where that is off.
            aux: Numbers of the dead latents, int64 `[dead]`, which AuxK lets predict the residual; None or empty for
                none.

        Returns:
            The reconstruction, the code, and the reconstructions of the auxiliary losses. Multi-TopK, the prefixes of a
            Matryoshka and the selection's own sums and loss are computed only in training mode.

        Raises:
            ValueError: If `x` has another width than D.
        """
        x_ND, k = self._flat(x), self.max_active
        selection = self.selection.wider() if self.multi_topk and self.training else self.selection
        prefixes = self.prefixes if self.training else ()
        rows_ND, acts, indices = selection.autoencode(
            x_ND, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.kernels, prefixes
        )
        *smaller_GND, recon_ND = (rows_ND + self.b_dec).unbind() if prefixes else (rows_ND + self.b_dec,)
        multi_ND = None
        # Largest first, so the code at k is a prefix of the code at 4k.
        acts_NK, indices_NK = acts[:, :k], indices[:, :k]
        if selection is not self.selection:
            recon_ND, multi_ND = self.kernels.decode(acts_NK, indices_NK, self.W_dec) + self.b_dec, recon_ND
        aux_ND = self._predict_with_dead(x_ND, aux) if aux is not None and len(aux) > 0 else None

        lead = x.shape[:-1]
        acts, indices = acts_NK.reshape(*lead, k), indices_NK.reshape(*lead, k)
        return SaeOutput(
            recon_ND.view(x.shape),
            acts,
            indices,
            self.selection.fired(acts),
            None if aux_ND is None else aux_ND.view(x.shape),
            None if multi_ND is None else multi_ND.view(x.shape),
            tuple(smaller_ND.view(x.shape) for smaller_ND in smaller_GND),
            None if dead is None else torch.where(dead, self.b_enc, 0.0).sum(),
            self.selection.sums(acts) if self.training and self.selection.moves else None,
            self.selection.penalty(acts, indices) if self.training else None,
        )

    @torch.no_grad()
    def fit_selection_(self, rows_RD: Tensor, rms: float) -> None:
        """Fit the selection to the activations of R tokens, `[R, D]`, in place; see `Selection.fit_`."""
        if self.selection.fits:
            self.selection.fit_(F.linear(rows_RD - self.b_dec, self.W_enc, self.b_enc), rms)

    def _flat(self, x: Tensor) -> Tensor:
        """`x` as `[N, D]` in the parameters' type. Its width is compared as a Python number: no device is asked."""
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.d_in,):
            raise ValueError(f"expected activations [..., {self.d_in}] for this SAE, got {described(x)}")
        return x.reshape(-1, self.d_in).to(self.dtype)

    def _predict_with_dead(self, x_ND: Tensor, dead: Tensor) -> Tensor:
        """AuxK's prediction of `x − x̂` from the top D/2 dead latents, without `b_dec` (appendix A.2 of the paper)."""
        k_aux = min(self.d_in // 2, len(dead))
        W_enc, b_enc, W_dec = self.W_enc[dead], self.b_enc[dead], self.W_dec[dead]
        return self.kernels.autoencode(x_ND, W_enc, b_enc, W_dec, self.b_dec, k_aux)[0]

    if TYPE_CHECKING:  # nn.Module's own says Any

        def __call__(self, x: Tensor, dead: Tensor | None = None, *, aux: Tensor | None = None) -> SaeOutput: ...  # noqa: D102

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
