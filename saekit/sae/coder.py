"""The maths of a sparse coder: autoencoder, transcoder, crosscoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saekit.sae.kernels import Kernels, default_kernels
from saekit.sae.kernels.eager import unit_rows
from saekit.sae.output import Encoded, SaeOutput, check_code, described
from saekit.sae.selection.base import Selection, make_selection
from saekit.sae.trained_on import TrainedOn

NOWHERE: Mapping[str, int] = {}


class Coder(nn.Module):
    """Computes a sparse coder. `Sae` adds reading and writing files, and documents the arguments and parameters."""

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
        transcode: bool = False,
        d_out: int | None = None,
        skip_connection: bool = False,
        max_norm_out: float | None = None,
        reads: Mapping[str, int] = NOWHERE,
        writes: Mapping[str, int] = NOWHERE,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if d_in < 1 or num_latents < 1 or k < 1:
            raise ValueError(f"d_in, num_latents and k must be at least 1, got {d_in}, {num_latents} and {k}")
        for name, limit in (("max_norm", max_norm), ("max_norm_out", max_norm_out)):
            if limit is not None and not limit >= 0:
                raise ValueError(f"{name} must be at least 0, got {limit}")
        self.d_out = d_in if d_out is None else d_out
        if not transcode and (self.d_out != d_in or skip_connection or max_norm_out is not None):
            raise ValueError("d_out, skip_connection and max_norm_out are for transcoders only: set transcode=True")
        for name, widths, total in (("reads", reads, d_in), ("writes", writes, self.d_out)):
            if widths and sum(widths.values()) != total:
                raise ValueError(f"the widths of {name}, {list(widths.values())}, do not add up to {total}")
        self.selection = make_selection(selection, k, num_latents)
        if multi_topk and not self.selection.multi_topk:
            raise ValueError(f"multi_topk needs the selection topk: {self.activation} has no code at 4k")
        self.d_in = d_in
        self.num_latents = num_latents
        self.k = k
        self.normalize_decoder = normalize_decoder
        self.multi_topk = multi_topk
        self.max_norm = max_norm
        self.transcode = transcode
        self.max_norm_out = max_norm_out
        self.reads, self.writes = dict(reads), dict(writes)
        self.trained_on: TrainedOn | None = None
        """The language model and hookpoint; set by `saekit.load` if the files name them."""
        self.chosen_kernels: Kernels | None = None
        self.prefixes: tuple[int, ...] = ()
        """For training a Matryoshka SAE: the sizes of its nested dictionaries, ascending. The last one is M."""

        # U(−1/√D, 1/√D) is the usual initialization of a linear layer. An SAE's decoder starts as the transpose of its
        # encoder, with unit rows.
        def initial(width: int) -> Tensor:
            return torch.empty(num_latents, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)

        W_MD = initial(d_in)
        self.W_enc = nn.Parameter(W_MD.to(device))
        self.b_enc = nn.Parameter(torch.zeros(num_latents, device=device))
        self.W_dec = nn.Parameter(unit_rows(initial(self.d_out) if transcode else W_MD).to(device))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, device=device))
        skip = torch.zeros(self.d_out, d_in, device=device) if skip_connection else None
        self.W_skip = None if skip is None else nn.Parameter(skip)
        if device is not None:
            self.selection.to(device)

    def sizes(self) -> dict[str, Any]:
        """Return the arguments of a new SAE of the same shape, with a copy of the selection and its state."""
        return {
            "d_in": self.d_in,
            "num_latents": self.num_latents,
            "k": self.k,
            "normalize_decoder": self.normalize_decoder,
            "multi_topk": self.multi_topk,
            "selection": self.selection.clone(),
            "max_norm": self.max_norm,
            **(self._transcoder_sizes() if self.transcode else {}),
            **({"reads": dict(self.reads), "writes": dict(self.writes)} if self.reads else {}),
        }

    def _transcoder_sizes(self) -> dict[str, Any]:
        return {
            "transcode": True,
            "d_out": self.d_out,
            "skip_connection": self.W_skip is not None,
            "max_norm_out": self.max_norm_out,
        }

    def extra_repr(self) -> str:
        """Return the sizes, for `print(sae)`."""
        limit = "" if self.max_norm is None else f", max_norm={self.max_norm:.6g}"
        skip = "" if self.W_skip is None else ", with a skip connection"
        out = f", transcoder to d_out={self.d_out}{skip}" if self.transcode else ""
        return f"d_in={self.d_in}, num_latents={self.num_latents}, k={self.k}, {self.selection!r}{limit}{out}"

    def _apply(self, *args: Any, **kwargs: Any) -> Coder:
        """Move the parameters, and the selection's state with them; only the parameters change their type."""
        super()._apply(*args, **kwargs)
        self.selection.to(self.device)
        return self

    @property
    def activation(self) -> str:
        """Return the selection's name."""
        return self.selection.name

    @property
    def max_active(self) -> int:
        """Return K, the largest number of active latents per token."""
        return self.selection.max_active

    @property
    def device(self) -> torch.device:
        """Return the parameters' device."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the parameters' type. Inputs are cast to it."""
        return self.W_enc.dtype

    @property
    def kernels(self) -> Kernels:
        """Return the kernels of this SAE: `chosen_kernels` if set, otherwise the fastest exact ones for its device."""
        return self.chosen_kernels or default_kernels(self.device.type)

    @property
    def centre(self) -> Tensor | None:
        """Return what the encoder subtracts from its input: `b_dec`, or None for a transcoder."""
        return None if self.transcode else self.b_dec

    def encode(self, x: Tensor) -> Encoded:
        """Encode activations `x`, `[..., D]`, as a sparse code, two tensors `[..., K]`.

        Raises:
            ValueError: If the width of `x` is not D.
        """
        acts_NK, indices_NK = self.selection.encode(self._flat(x), self.W_enc, self.b_enc, self.centre, self.kernels)
        shape = (*x.shape[:-1], self.max_active)
        return Encoded(acts_NK.view(shape), indices_NK.view(shape))

    def counted(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return which tokens are counted: bool `[...]`, False where a norm exceeds `max_norm` or `max_norm_out`.

        Tokens with NaN are counted, so that the NaN is noticed.

        Args:
            x: `[..., D]`, the input.
            y: `[..., D_out]`, a transcoder's target, if known.
        """
        counted = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        for acts, limit in ((x, self.max_norm), (y, self.max_norm_out)):
            if acts is not None and limit is not None:
                counted &= ~(acts.float().norm(dim=-1) > limit)
        return counted

    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Reconstruct the activations of counted tokens, `[..., D]`. Excluded tokens keep theirs.

        Args:
            x: `[..., D]`, the input.
            y: `[..., D_out]`, a transcoder's target, which excluded tokens keep.

        Raises:
            ValueError: If the coder is a transcoder and `y` is missing.
        """
        if self.transcode and y is None:
            raise ValueError("a transcoder predicts other activations than it reads: pass its target as y")
        return torch.where(self.counted(x, y)[..., None], self(x).recon.to(x.dtype), x if y is None else y)

    def decode(self, acts: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        """Decode a code, two tensors `[..., K]`, into the reconstruction `[..., D_out]`. `K` may be any number.

        Args:
            acts: `[..., K]`, values of the active latents.
            indices: int64 `[..., K]`, their indices.
            x: `[..., D]`, the input. Required with a skip connection.

        Raises:
            ValueError: If the shapes differ, if an index is out of range (checked on a CPU only, where it costs no
                synchronization), or if there is a skip connection and no `x`.
        """
        check_code(acts, indices, self.num_latents)
        if self.W_skip is not None and x is None:
            raise ValueError("the skip connection reads the input: pass it as x")
        k = acts.shape[-1]
        rows_ND = self.kernels.decode(acts.reshape(-1, k), indices.reshape(-1, k), self.W_dec)
        x_ND = None if x is None else self._flat(x)
        return (rows_ND + self._bias_and_skip(x_ND)).view(*acts.shape[:-1], self.d_out)

    def without_latents(self, x: Tensor) -> Tensor:
        """Predict from `x`, `[..., D]`, without latents: `b_dec` plus the skip connection's output, `[..., D_out]`."""
        x_ND = self._flat(x)
        return self._bias_and_skip(x_ND).expand(len(x_ND), self.d_out).view(*x.shape[:-1], self.d_out)

    def _bias_and_skip(self, x_ND: Tensor | None) -> Tensor:
        """Return the part of the reconstruction without latents: `[D_out]`, or `[N, D_out]` with a skip connection."""
        return self.b_dec if self.W_skip is None or x_ND is None else F.linear(x_ND, self.W_skip, self.b_dec)

    def forward(self, x: Tensor, dead: Tensor | None = None, *, aux: Tensor | None = None) -> SaeOutput:
        """Encode and decode activations, and compute the inputs of the auxiliary losses.

        Args:
            x: `[..., D]`, the language model's activations, in any float type.
            dead: Which latents are dead, bool `[M]`, for the loss that raises their biases. None if that loss is off.
            aux: The indices of the dead latents, int64 `[dead]`, which predict the residual for AuxK. None or empty if
                AuxK is off or no latent is dead.

        Returns:
            The reconstruction, the code, and the reconstructions of the auxiliary losses. The forward pass computes
            Multi-TopK, the prefixes of a Matryoshka, and the selection's sums and penalty only in training mode.

        Raises:
            ValueError: If the width of `x` is not D.
        """
        x_ND, k = self._flat(x), self.max_active
        selection = self.selection.wider() if self.multi_topk and self.training else self.selection
        prefixes = self.prefixes if self.training else ()
        rows_ND, acts, indices = selection.autoencode(
            x_ND, self.W_enc, self.b_enc, self.W_dec, self.centre, self.kernels, prefixes
        )
        rest = self._bias_and_skip(x_ND)
        *smaller_GND, recon_ND = (rows_ND + rest).unbind() if prefixes else (rows_ND + rest,)
        multi_ND = None
        # The largest values come first, so the code at k is a prefix of the code at 4k.
        acts_NK, indices_NK = acts[:, :k], indices[:, :k]
        if selection is not self.selection:
            recon_ND, multi_ND = self.kernels.decode(acts_NK, indices_NK, self.W_dec) + rest, recon_ND
        aux_ND = self._predict_with_dead(x_ND, aux) if aux is not None and len(aux) > 0 else None

        lead, shape = x.shape[:-1], (*x.shape[:-1], self.d_out)
        acts, indices = acts_NK.reshape(*lead, k), indices_NK.reshape(*lead, k)
        return SaeOutput(
            recon_ND.view(shape),
            acts,
            indices,
            self.selection.fired(acts),
            None if aux_ND is None else aux_ND.view(shape),
            None if multi_ND is None else multi_ND.view(shape),
            tuple(smaller_ND.view(shape) for smaller_ND in smaller_GND),
            None if dead is None else torch.where(dead, self.b_enc, 0.0).sum(),
            self.selection.sums(acts) if self.training and self.selection.moves else None,
            self.selection.penalty(acts, indices) if self.training else None,
        )

    @torch.no_grad()
    def fit_selection_(self, rows_RD: Tensor, rms: float) -> None:
        """Fit the selection to the activations of R tokens, `[R, D]`, in place. See `Selection.fit_`."""
        if self.selection.fits:
            centred_RD = rows_RD if self.centre is None else rows_RD - self.centre
            self.selection.fit_(F.linear(centred_RD, self.W_enc, self.b_enc), rms)

    def _flat(self, x: Tensor) -> Tensor:
        """Return `x` as `[N, D]` in the parameters' type. The check of its width needs no synchronization."""
        if not isinstance(x, Tensor) or x.shape[-1:] != (self.d_in,):
            raise ValueError(f"this SAE needs activations of shape [..., {self.d_in}], got {described(x)}")
        return x.reshape(-1, self.d_in).to(self.dtype)

    def _predict_with_dead(self, x_ND: Tensor, dead: Tensor) -> Tensor:
        """Predict the residual from the top D_out/2 dead latents, without `b_dec` (Gao et al. 2024, appendix A.2)."""
        k_aux = min(self.d_out // 2, len(dead))
        W_enc, b_enc, W_dec = self.W_enc[dead], self.b_enc[dead], self.W_dec[dead]
        return self.kernels.autoencode(x_ND, W_enc, b_enc, W_dec, self.centre, k_aux)[0]

    if TYPE_CHECKING:  # nn.Module.__call__ is typed as returning Any

        def __call__(self, x: Tensor, dead: Tensor | None = None, *, aux: Tensor | None = None) -> SaeOutput: ...  # noqa: D102
