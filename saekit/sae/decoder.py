"""Keep decoder rows at norm 1: project gradients, renormalize, and convert decoders with other norms."""

from __future__ import annotations

import torch

from saekit.sae.kernels.eager import row_norms, unit_rows
from saekit.sae.model import Sae


@torch.no_grad()
def normalize_decoder_(sae: Sae) -> None:
    """Scale the rows of `W_dec` to norm 1, in place."""
    sae.W_dec.div_(row_norms(sae.W_dec))


@torch.no_grad()
def project_decoder_gradient_(sae: Sae) -> None:
    """Remove from each decoder row's gradient the component parallel to the row, in place.

    Renormalizing undoes a step along the row anyway, but without the projection that component would still enter Adam's
    moments (Bricken et al. 2023, "Towards Monosemanticity", appendix on training; Gao et al. 2024 do the same).
    """
    grad_MD = sae.W_dec.grad
    if grad_MD is not None:
        unit_MD = unit_rows(sae.W_dec)
        grad_MD.sub_((grad_MD * unit_MD).sum(dim=1, keepdim=True) * unit_MD)


@torch.no_grad()
def give_encoder_the_norms_(sae: Sae) -> None:
    """Divide each row of `W_dec` by its norm, and multiply the latent's encoder row and bias by it, in place.

    Each latent's contribution to the reconstruction, `z_m W_dec[m]`, stays the same. Which latents are the k largest
    can change. A latent with a zero decoder row stays as it is.
    """
    norms_M1 = row_norms(sae.W_dec)
    scale_M1 = torch.where(sae.W_dec.any(dim=1, keepdim=True), norms_M1, 1.0)
    sae.W_dec.div_(norms_M1)
    sae.W_enc.mul_(scale_M1)
    sae.b_enc.mul_(scale_M1.squeeze(1))
