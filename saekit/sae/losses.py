"""The training loss: a sum over tokens, divided by numbers that are fixed before the backward pass.

The losses of chunks, micro-batches and ranks therefore add up: any split of a batch gives the same gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saekit.sae.output import SaeOutput

MULTI_TOPK_WEIGHT = 1 / 8
"""Weight of the loss at 4k (Gao et al. 2024, section 5.4)."""


class Losses(NamedTuple):
    """Terms of the loss, each a scalar: a sum over the chunk's tokens divided by `tokens · variance`."""

    total: Tensor
    """The loss: `mse + nested + penalty + auxk_alpha · auxk + revive_alpha · revive + multi_topk / 8`."""
    mse: Tensor
    """`Σ_t ‖x_t − x̂_t‖² / (N σ²)`."""
    auxk: Tensor | None
    """`Σ_t ‖e_t − ê_t‖² / (N v) · min(1, dead / k_aux)`, with the detached residual `e = x − x̂`; see `sae_losses`."""
    multi_topk: Tensor | None
    """Like `mse`, for the reconstruction from 4k latents."""
    nested: Tensor | None = None
    """The sum of a term like `mse` for each smaller prefix of a Matryoshka."""
    revive: Tensor | None = None
    """`−(n / N) Σ_m b_enc,m / σ₁` over the dead latents m, for a chunk of n tokens. For σ₁ see `sae_losses`."""
    penalty: Tensor | None = None
    """The selection's own term: a sum over tokens, divided like `mse`."""


def sae_losses(
    x_ND: Tensor,
    out: SaeOutput,
    *,
    scale: float | Tensor,
    auxk_alpha: float,
    num_dead: int,
    auxk_scale: float | Tensor | None = None,
    revive_alpha: float = 0.0,
    revive_scale: float | Tensor = 0.0,
    tokens: int | Tensor | None = None,
) -> Losses:
    """Compute the loss terms of one chunk of tokens (Gao et al. 2024, sections 2.4 and 5.4, appendix A.2).

    A dead latent gets no gradient from the reconstruction. The term `revive` raises its bias instead, until the latent
    is selected somewhere and learns again. Anthropic's "Circuits Updates, January 2025", section "Dictionary Learning
    Optimization Techniques", has a similar loss on dead latents' pre-activations. Adam's steps do not depend on a
    gradient's size, so the bias of a latent that stays dead rises by the biases' learning rate in every step.

    For a Matryoshka SAE (Bussmann et al. 2025, arXiv 2503.17547, section 3), the reconstruction from each prefix of the
    dictionary has the same weight as the full one.

    Args:
        x_ND: `[N, D]`, the target, which is an SAE's input, in the parameters' type.
        out: The SAE's output for these tokens.
        scale: `1 / (N σ²)`, with N the tokens of the whole optimizer step over all ranks, and σ² the target's total
            variance (trace of the covariance) from calibration. All scales are numbers or scalar tensors.
        auxk_alpha: Weight of the AuxK term.
        num_dead: Number of latents that were dead when the step began.
        auxk_scale: `1 / (N v)`, the factor of AuxK's loss. v is σ² by default, or the variance left to explain.
        revive_alpha: Weight of the term that raises dead latents' biases.
        revive_scale: `1 / (N σ₁)`, with σ₁ the root mean square of the layer's centred activations, the biases' unit.
        tokens: How many of the chunk's rows are tokens of the step. By default all.

    Returns:
        The terms. A term that is off is None.
    """
    tokens = len(x_ND) if tokens is None else tokens
    by = _in_type(scale, x_ND)
    mse = _squared_error(x_ND, out.recon) * by
    total = mse

    auxk = None
    if out.aux_recon is not None:
        k_aux = x_ND.shape[-1] // 2
        # A few dead latents cannot explain much of the residual, so their loss gets less weight.
        auxk = _squared_error((x_ND - out.recon).detach(), out.aux_recon) * (
            _in_type((scale if auxk_scale is None else auxk_scale) * min(1.0, num_dead / k_aux), x_ND)
        )
        total = total + auxk_alpha * auxk

    multi_topk = None
    if out.multi_recon is not None:
        multi_topk = _squared_error(x_ND, out.multi_recon) * by
        total = total + MULTI_TOPK_WEIGHT * multi_topk

    nested = None
    if out.prefix_recons:
        nested = torch.stack([_squared_error(x_ND, recon) for recon in out.prefix_recons]).sum() * by
        total = total + nested

    penalty = None
    if out.penalty is not None:
        penalty = out.penalty.sum() * by
        total = total + penalty

    revive = None
    if out.dead_biases is not None and revive_alpha > 0:
        revive = -_in_type(tokens * revive_scale, x_ND) * out.dead_biases
        total = total + revive_alpha * revive

    return Losses(total, mse, auxk, multi_topk, nested, revive, penalty)


def _squared_error(x_ND: Tensor, recon_ND: Tensor) -> Tensor:
    """Compute `Σ_t ‖x_t − x̂_t‖²`, in half the memory passes of subtracting, squaring and summing with gradients."""
    return F.mse_loss(recon_ND, x_ND, reduction="sum")


def _in_type(scale: float | Tensor, x_ND: Tensor) -> float | Tensor:
    """Cast a scalar tensor to the activations' type, as torch does with a Python number: float64 widens the loss."""
    return scale.to(x_ND.dtype) if isinstance(scale, Tensor) else scale
