"""The k-sparse autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saekit.sae.kernels import Kernels, default_kernels
from saekit.sae.kernels.eager import keep_above, unit_rows
from saekit.sae.output import Encoded, SaeOutput

ACTIVATIONS = ("topk", "batchtopk", "groupmax")
"""Ways to choose a token's latents, by the names that `--activation` and `cfg.json` have for them."""
WIDER = 4
"""So many times k latents are Multi-TopK's second code, and the most that a BatchTopK code has for one token."""
NEAR = 1.1
"""Values above a BatchTopK threshold by this factor at most are counted as near it."""


class Sae(nn.Module):
    """A TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093, sections 2.1 and 2.3).

    With `x ∈ R^D`:

        z = TopK(ReLU(W_enc (x − b_dec) + b_enc))        k of M latents are kept
        x̂ = W_decᵀ z + b_dec

    With a threshold θ it is a BatchTopK autoencoder (Bussmann et al. 2024, arXiv 2412.06410, section 3) in the form in
    which that paper uses it after training: a token has as many latents as it needs, and k is their mean.

        z_m = a_m if a_m > θ else 0        a = TopK(ReLU(W_enc (x − b_dec) + b_enc)) with 4k of M latents kept

    Or a GroupMax autoencoder, as sparsify has it: the latents are k groups of M / k, in their order, and the largest of
    each group is kept.

    Args:
        d_in: D, the width of the residual stream.
        num_latents: M, the size of the dictionary.
        k: Active latents per token, at most `num_latents`; with a threshold, their mean over many tokens.
        normalize_decoder: Whether the rows of `W_dec` are kept at unit norm while training.
        multi_topk: Whether the forward pass in training also reconstructs from `4k` latents (section 5.4 of the paper).
        threshold: θ, in the activations' unit, at least 0; None for TopK. It is a plain number of this module, not a
            parameter: whoever trains moves it between optimiser steps.
        groupmax: Whether one latent of each of k groups is kept, instead of the k largest of all.
        max_norm: How long the activations are at most that the SAE is trained on; None for any. Longer ones, attention
            sinks, are none that it is for (`covers`); `forward` treats them like others.
        generator: Source of the initial weights; on the CPU, so that they are the same wherever the SAE will live.
        device: Where the parameters live.

    Raises:
        ValueError: If a size is not positive, `k` is larger than `num_latents`, a number is negative, two of
            `threshold`, `groupmax` and `multi_topk` are given, or `groupmax` while `num_latents` is no multiple of `k`.

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
        threshold: float | None = None,
        groupmax: bool = False,
        max_norm: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if d_in < 1 or num_latents < 1 or k < 1:
            raise ValueError(f"d_in, num_latents and k must be positive, got {d_in}, {num_latents} and {k}")
        if k > num_latents:
            raise ValueError(f"k = {k} is larger than num_latents = {num_latents}: choose a smaller k or more latents")
        if threshold is not None and not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        if threshold is not None and multi_topk:
            raise ValueError("multi_topk is for TopK: a code with a threshold has up to 4k latents as it is")
        if max_norm is not None and not max_norm >= 0:
            raise ValueError(f"max_norm must be at least 0, got {max_norm}")
        if groupmax and (threshold is not None or multi_topk):
            raise ValueError("groupmax chooses one latent per group: it has neither a threshold nor multi_topk")
        if groupmax and num_latents % k:
            raise ValueError(f"groupmax needs k groups of one size: {num_latents} latents are no multiple of {k}")
        self.d_in = d_in
        self.num_latents = num_latents
        self.k = k
        self.normalize_decoder = normalize_decoder
        self.multi_topk = multi_topk
        self.threshold = threshold
        self.groupmax = groupmax
        self.max_norm = max_norm
        self.chosen_kernels: Kernels | None = None
        self.prefixes: tuple[int, ...] = ()
        """Of a Matryoshka SAE in training: numbers of latents, ascending, the last one M."""
        # U(−1/√D, 1/√D), the field's usual start for a linear layer; the decoder is its transpose with unit rows.
        W_MD = torch.empty(num_latents, d_in).uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
        self.W_enc = nn.Parameter(W_MD.to(device))
        self.b_enc = nn.Parameter(torch.zeros(num_latents, device=device))
        self.W_dec = nn.Parameter(unit_rows(W_MD).to(device))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device))

    def sizes(self) -> dict[str, Any]:
        """The arguments that make another SAE of the same shape."""
        return {
            "d_in": self.d_in,
            "num_latents": self.num_latents,
            "k": self.k,
            "normalize_decoder": self.normalize_decoder,
            "multi_topk": self.multi_topk,
            "threshold": self.threshold,
            "groupmax": self.groupmax,
            "max_norm": self.max_norm,
        }

    def extra_repr(self) -> str:
        """Sizes, for `print(sae)`."""
        threshold = "" if self.threshold is None else f", threshold={self.threshold:.6g}"
        groupmax = ", groupmax" if self.groupmax else ""
        limit = "" if self.max_norm is None else f", max_norm={self.max_norm:.6g}"
        return f"d_in={self.d_in}, num_latents={self.num_latents}, k={self.k}{threshold}{groupmax}{limit}"

    @property
    def activation(self) -> str:
        """Which of `ACTIVATIONS`."""
        return "groupmax" if self.groupmax else "topk" if self.threshold is None else "batchtopk"

    @property
    def parts(self) -> int:
        """In how many equal parts of the dictionary the latents of a token are chosen."""
        return self.k if self.groupmax else 1

    @property
    def max_active(self) -> int:
        """K, the most latents that a token can have: k, or 4k with a threshold."""
        return self.k if self.threshold is None else min(WIDER * self.k, self.num_latents)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type; inputs are cast to it."""
        return self.W_enc.dtype

    @property
    def kernels(self) -> Kernels:
        """What the SAE is computed with: those set as `chosen_kernels`, or the fastest exact ones of its device."""
        return self.chosen_kernels or default_kernels(self.device.type)

    def encode(self, x: Tensor) -> Encoded:
        """The sparse code of `x`, `[..., D]` → two tensors `[..., K]`."""
        x_ND, k = self._flat(x), self.max_active
        acts_NK, indices_NK = self.kernels.encode_topk(
            x_ND, self.W_enc, self.b_enc, k, centre_D=self.b_dec, parts=self.parts
        )
        acts_NK = keep_above(acts_NK, self.threshold)
        shape = (*x.shape[:-1], k)
        return Encoded(acts_NK.view(shape), indices_NK.view(shape))

    def covers(self, x: Tensor) -> Tensor:
        """Which of the activations `[..., D]` are no longer than `max_norm`: bool `[...]`; NaN is, so that it shows."""
        if self.max_norm is None:
            return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        return ~(x.float().norm(dim=-1) > self.max_norm)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The reconstruction of the activations `[..., D]` that the SAE `covers`; the others as they are."""
        return torch.where(self.covers(x)[..., None], self(x).recon.to(x.dtype), x)

    def decode(self, acts: Tensor, indices: Tensor) -> Tensor:
        """The reconstruction from a code, two tensors `[..., K]` → `[..., D]`. Any `K` will do."""
        k = acts.shape[-1]
        out_ND = self.kernels.decode(acts.reshape(-1, k), indices.reshape(-1, k), self.W_dec) + self.b_dec
        return out_ND.view(*acts.shape[:-1], self.d_in)

    def forward(self, x: Tensor, dead: Tensor | None = None, *, auxk: bool = True) -> SaeOutput:
        """Encode and decode, with what the auxiliary losses need.

        Args:
            x: `[..., D]`, residual-stream activations as the language model gives them, in any float type.
            dead: Numbers of the dead latents, int64 `[dead]`, for the losses that revive them; None or empty for none.
            auxk: Whether they are also to predict the residual, for AuxK.

        Returns:
            The reconstruction, the code, and the reconstructions of the auxiliary losses. Multi-TopK and the prefixes
            of a Matryoshka are computed only in training mode.
        """
        x_ND = self._flat(x)
        with_multi = self.multi_topk and self.training
        k = self.max_active
        widest = min(WIDER * k, self.num_latents) if with_multi else k
        weights = (self.W_enc, self.b_enc, self.W_dec, self.b_dec)
        smaller_GND: list[Tensor] = []
        if self.prefixes and self.training:
            rows_GND, acts, indices = self.kernels.autoencode_nested(
                x_ND, *weights, widest, self.prefixes, self.threshold, self.parts
            )
            *smaller_GND, recon_ND = (rows_GND + self.b_dec).unbind()
        else:
            rows_ND, acts, indices = self.kernels.autoencode(x_ND, *weights, widest, self.threshold, self.parts)
            recon_ND = rows_ND + self.b_dec
        multi_ND = None
        # Largest first, so the code at k is a prefix of the code at 4k.
        acts_NK, indices_NK = acts[:, :k], indices[:, :k]
        if with_multi:
            recon_ND, multi_ND = self.kernels.decode(acts_NK, indices_NK, self.W_dec) + self.b_dec, recon_ND
        aux_ND = dead_biases = None
        if dead is not None and len(dead) > 0:
            dead_biases = self.b_enc[dead].sum()
            aux_ND = self._predict_with_dead(x_ND, dead) if auxk else None

        lead, near_N = x.shape[:-1], self._count_near(acts_NK) if self.training else None
        return SaeOutput(
            recon_ND.view(x.shape),
            acts_NK.reshape(*lead, k),
            indices_NK.reshape(*lead, k),
            None if aux_ND is None else aux_ND.view(x.shape),
            None if multi_ND is None else multi_ND.view(x.shape),
            tuple(smaller_ND.view(x.shape) for smaller_ND in smaller_GND),
            dead_biases,
            None if near_N is None else near_N.view(lead),
        )

    def _flat(self, x: Tensor) -> Tensor:
        """`x` as `[N, D]` in the parameters' type."""
        return x.reshape(-1, self.d_in).to(self.dtype)

    def _count_near(self, acts_NK: Tensor) -> Tensor | None:
        if self.threshold is None:
            return None
        return ((acts_NK > self.threshold) & (acts_NK <= NEAR * self.threshold)).sum(1)

    def _predict_with_dead(self, x_ND: Tensor, dead: Tensor) -> Tensor:
        """AuxK's prediction of `x − x̂` from the top D/2 dead latents, without `b_dec` (appendix A.2 of the paper)."""
        k_aux = min(self.d_in // 2, len(dead))
        W_enc, b_enc, W_dec = self.W_enc[dead], self.b_enc[dead], self.W_dec[dead]
        return self.kernels.autoencode(x_ND, W_enc, b_enc, W_dec, self.b_dec, k_aux)[0]

    if TYPE_CHECKING:  # nn.Module's own says Any

        def __call__(self, x: Tensor, dead: Tensor | None = None, *, auxk: bool = True) -> SaeOutput: ...  # noqa: D102

    @classmethod
    def load_from_disk(cls, path: str | Path, device: torch.device | str = "cpu") -> Sae:
        """See `saekit.sae.storage.load_from_disk`."""
        from saekit.sae import storage

        return storage.load_from_disk(path, device)

    @classmethod
    def load_many(cls, path: str | Path, device: torch.device | str = "cpu") -> dict[str, Sae]:
        """See `saekit.sae.storage.load_many`."""
        from saekit.sae import storage

        return storage.load_many(path, device)

    @classmethod
    def load_from_hub(
        cls, repo_id: str, hookpoint: str | None = None, device: torch.device | str = "cpu", **kwargs: Any
    ) -> Sae:
        """See `saekit.sae.storage.load_from_hub`."""
        from saekit.sae import storage

        return storage.load_from_hub(repo_id, hookpoint, device, **kwargs)

    def save_to_disk(self, path: str | Path) -> None:
        """See `saekit.sae.storage.save_to_disk`."""
        from saekit.sae import storage

        storage.save_to_disk(self, path)


def without_memory(**sizes: Any) -> Sae:
    """An SAE of those sizes on torch's meta device: no memory, and no numbers from the global generator."""
    with torch.device("meta"):
        return Sae(**sizes)


def around(tensors: Mapping[str, Tensor], **sizes: Any) -> Sae:
    """An SAE of those sizes whose parameters are these tensors, by name; they are not copied."""
    sae = without_memory(**sizes)
    sae.load_state_dict(dict(tensors), assign=True)
    return sae
