"""Compare two checkpoints, and find the features that both have learned (`saekit inspect A B`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saekit.analysis.inspect import Inspection, LayerInspection
from saekit.analysis.measure import EXACT_BUDGET, rows_at_a_time
from saekit.analysis.sharing import compared
from saekit.errors import UserError
from saekit.runs.locate import read_some_tensors
from saekit.sae.kernels.eager import unit_rows
from saekit.sae.storage import WEIGHTS_FILE as WEIGHTS

SHARED_COSINE = 0.9
"""Two decoder rows of different dictionaries count as the same feature from this cosine on."""


@dataclass(frozen=True)
class Shared:
    """How close the decoder rows of one dictionary are to the nearest rows of another."""

    mean: float
    """The mean cosine with the nearest row, or mean max cosine similarity (Sharkey et al. 2022, "Taking features out of
    superposition with sparse autoencoders")."""
    share: float
    """The share of rows whose nearest row has a cosine of at least `SHARED_COSINE`."""


@dataclass(frozen=True)
class LayerComparison:
    """The same layer in two checkpoints."""

    hookpoint: str
    first: LayerInspection
    second: LayerInspection
    of_first: Shared | None
    """The first's rows compared with the second's. None if they write different hookpoints or widths."""
    of_second: Shared | None
    """The second's rows compared with the first's."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of two checkpoints."""

    first: Inspection
    second: Inspection
    layers: tuple[LayerComparison, ...]
    """The layers that both have."""

    def evaluated(self, which: str, hookpoint: str) -> dict[str, Any] | None:
        """Return the results of `saekit eval` for a layer of `first` or `second`, or None."""
        record = getattr(self, which).evaluation
        layers = record["layers"] if record else ()
        return next((layer for layer in layers if layer["hookpoint"] == hookpoint), None)


def compare(first: Inspection, second: Inspection) -> Comparison:
    """Compare two inspections, layer by layer.

    Raises:
        UserError: If they have no layer in common.
    """
    others = {layer.hookpoint: layer for layer in second.layers}
    common = [(layer, others[layer.hookpoint]) for layer in first.layers if layer.hookpoint in others]
    if not common:
        raise UserError(f"{first.path} and {second.path} have no layer in common")
    layers = []
    for one, other in common:
        alike = one.d_out == other.d_out and one.writes == other.writes
        shared = shared_rows(_decoder(one), _decoder(other)) if alike else (None, None)
        layers.append(LayerComparison(one.hookpoint, one, other, *shared))
    return Comparison(first, second, tuple(layers))


def shared_rows(first_MD: Tensor, second_LD: Tensor, budget: int = EXACT_BUDGET) -> tuple[Shared, Shared]:
    """Compare the rows of each dictionary with the other's, in pieces: the `[M, L]` cosines never exist all at once.

    Args:
        first_MD: `[M, D]`.
        second_LD: `[L, D]`.
        budget: Multiply-adds to spend on each. If all rows take more, an even sample of them is compared.
    """
    return _nearest(first_MD, second_LD, budget), _nearest(second_LD, first_MD, budget)


def _nearest(rows_MD: Tensor, among_LD: Tensor, budget: int) -> Shared:
    rows_MD, among_LD = unit_rows(rows_MD), unit_rows(among_LD)
    count = max(1, min(len(rows_MD), budget // among_LD.numel()))
    sample = torch.linspace(0, len(rows_MD) - 1, count).long()
    nearest = torch.cat(
        [(rows_MD[piece] @ among_LD.T).amax(1) for piece in sample.split(rows_at_a_time(len(among_LD)))]
    ).clamp_max(1)
    return Shared(nearest.mean().item(), (nearest >= SHARED_COSINE).double().mean().item())


def _decoder(layer: LayerInspection) -> Tensor:
    return compared(read_some_tensors(layer.path / WEIGHTS, ["W_dec"])["W_dec"].float(), layer.sharing)
