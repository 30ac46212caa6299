"""What the page's script reads of a layer: arrays, in which tokens are numbers of the page's own vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from saekit.analysis.codes import LATENTS_AT_ONCE
from saekit.analysis.features import LayerFeatures

NOTHING = -1


class Vocabulary:
    """Numbers the tokens that a page shows, in the order in which they come."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        """Token ids, by number."""
        self._number_of = np.full(0, NOTHING, np.int64)

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """Return each token's number in the vocabulary, which grows by tokens that are new.

        Args:
            ids: Token ids, int64, in any shape; -1 stays.
        """
        known = len(self._number_of)
        largest = int(ids.max(initial=NOTHING))
        if largest >= known:
            self._number_of = np.concatenate([self._number_of, np.full(largest + 1 - known, NOTHING)])
        seen = np.unique(ids[ids >= 0])
        fresh = seen[self._number_of[seen] == NOTHING]
        self._number_of[fresh] = len(self.ids) + np.arange(len(fresh))
        self.ids += fresh.tolist()
        if not len(self._number_of):
            return ids
        return np.where(ids >= 0, self._number_of[ids], NOTHING)


def arrays_of(layer: LayerFeatures, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Return arrays with one row for each latent that has a page, `[L, ...]`."""
    arrays = {
        "latents": layer.latents_L,
        "counts": layer.counts_M[layer.latents_L],
        "quantiles": layer.quantiles_L,
        "histogram": layer.histograms.counts_LB,
        "bounds": layer.histograms.bounds_L2,
        "places": layer.contexts.places_LC,
        "acts": layer.contexts.acts_LC,
        "shades": _shades(layer),
        "favorites": vocabulary.numbers(layer.favorites_L),
        "shares": layer.shares_L,
        "neighbours": layer.neighbours.latents_LN.numpy(),
        "cosines": layer.neighbours.cosines_LN.numpy(),
    }
    if layer.part_norms_LH is not None:
        arrays["norms"] = layer.part_norms_LH.numpy()
    if layer.lens is not None:
        arrays |= {
            "promoted": vocabulary.numbers(layer.lens.promoted_LN.numpy()),
            "rises": layer.lens.rises_LN.numpy(),
            "suppressed": vocabulary.numbers(layer.lens.suppressed_LN.numpy()),
            "falls": layer.lens.falls_LN.numpy(),
        }
    return arrays


def _shades(layer: LayerFeatures) -> np.ndarray:
    """Activations in the contexts as parts of 255 of the latent's largest, uint8 `[L, C, WINDOW]`."""
    acts_LCW, largest_L = layer.contexts.acts_LCW, layer.quantiles_L[:, -1][:, None, None]
    shades = np.zeros(acts_LCW.shape, np.uint8)
    with np.errstate(invalid="ignore"):
        for start in range(0, len(shades), LATENTS_AT_ONCE):
            some = slice(start, start + LATENTS_AT_ONCE)
            shades[some] = np.ceil(np.nan_to_num(acts_LCW[some] / largest_L[some]) * 255)
    return shades


def silent_of(layer: LayerFeatures) -> dict[str, np.ndarray]:
    """Return the numbers of the latents that never fired; they have no row where the page has a sample."""
    return {"silent": np.flatnonzero(layer.counts_M == 0)}


def facts_of(layer: LayerFeatures, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what else the script needs to know, as plain values."""
    (found,) = (each for each in evaluation["layers"] if each["hookpoint"] == layer.hookpoint)
    return {
        "hookpoint": layer.hookpoint,
        "num_latents": len(layer.counts_M),
        "tokens": found["reconstruction"]["tokens"],
        "no_lens": layer.no_lens,
        "has_lens": layer.lens is not None,
        "parts": [] if layer.part_norms_LH is None else list(found["writes"]),
    }


def nearest(layer: LayerFeatures) -> np.ndarray:
    """Return each latent's largest cosine with another, `[L]`; 0 in a dictionary of one."""
    cosines_LN = layer.neighbours.cosines_LN.numpy()
    return cosines_LN[:, 0] if cosines_LN.shape[1] else np.zeros(len(cosines_LN), np.float32)
