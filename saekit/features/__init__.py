"""What each latent does: the contexts it fires in, the tokens it promotes, its neighbours in the decoder.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.features.codes import Codes
from saekit.features.contexts import Contexts, find_contexts
from saekit.features.gather import Features, LayerFeatures, gather_features
from saekit.features.lens import Lens, logit_lens
from saekit.features.similar import Neighbours, nearest_rows

__all__ = [
    "Codes",
    "Contexts",
    "Features",
    "LayerFeatures",
    "Lens",
    "Neighbours",
    "find_contexts",
    "gather_features",
    "logit_lens",
    "nearest_rows",
]
