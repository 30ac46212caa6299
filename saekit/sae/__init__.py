"""The sparse autoencoder and its maths, in torch alone. Nothing here knows about ranks.

Shape suffixes, here and in the rest of the package: N tokens, D model width, M latents, K active latents, B sequences,
T positions. `x_ND` is a tensor with N rows and D columns.

Internal: may change in any release. The API is the names in `saekit`.
"""

from saekit.sae.decoder import normalize_decoder_, project_decoder_gradient_
from saekit.sae.formats.saelens import save_as_saelens
from saekit.sae.losses import Losses, sae_losses
from saekit.sae.model import Sae
from saekit.sae.output import Encoded, SaeOutput

__all__ = [
    "Encoded",
    "Losses",
    "Sae",
    "SaeOutput",
    "normalize_decoder_",
    "project_decoder_gradient_",
    "sae_losses",
    "save_as_saelens",
]
