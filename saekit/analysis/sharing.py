"""Which hookpoints a crosscoder's latents write: decoder norms per hookpoint, on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.activations.hookpoints import OTHER

RELATIVE_BINS = 20
"""Of the histogram of relative decoder norms."""
WRITTEN = 0.5
"""A latent counts as written to a hookpoint if its norm there is at least this part of its largest."""


@dataclass(frozen=True)
class Part:
    """One hookpoint of a crosscoder."""

    hookpoint: str
    width: int
    scale: float
    """By which decoder rows are multiplied to be compared over hookpoints."""
    median: float
    """Of the rows' norms, scaled."""
    own: int
    """Latents that are written to this hookpoint alone."""


@dataclass(frozen=True)
class Sharing:
    """How far a crosscoder's hookpoints share latents."""

    parts: tuple[Part, ...]
    latents: tuple[int, ...]
    """How many are written to one hookpoint, to two, ... to all; those without a decoder row are left out."""
    by_variance: bool
    """Whether scales are those of training, under which all hookpoints have the same variance; if the files do not say
    them, each hookpoint's norms are relative to their root mean square."""
    relative: tuple[int, ...] | None = None
    """Of a crosscoder of two models: how many latents have which relative decoder norm (`relative_norms`), in
    `RELATIVE_BINS` bins from 0 to 1."""


def scales_of(decoder_MD: Tensor, widths: Sequence[int], scale_D: Tensor | None) -> list[float]:
    """Return the scale of each hookpoint.

    Args:
        decoder_MD: `[M, D]`.
        widths: Of the hookpoints, in the order of the columns.
        scale_D: `[D]`, from the training's state; None if that is not there.
    """
    if scale_D is not None:
        return [part[0].item() for part in scale_D.split(list(widths))]
    parts = decoder_MD.split(list(widths), 1)
    return [1 / max(part.norm(dim=1).square().mean().sqrt().item(), 1e-30) for part in parts]


def part_norms(decoder_MD: Tensor, widths: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Return the norms of decoder rows per hookpoint, scaled: `[M, H]`."""
    parts = zip(decoder_MD.split(list(widths), 1), scales, strict=True)
    return torch.stack([part.norm(dim=1) * scale for part, scale in parts], 1)


def evened(decoder_MD: Tensor, widths: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Return decoder rows with each hookpoint's part scaled, `[M, D]`; as they are for a single one."""
    if len(widths) < 2:
        return decoder_MD
    parts = zip(decoder_MD.split(list(widths), 1), scales, strict=True)
    return torch.cat([part * scale for part, scale in parts], 1)


def relative_norms(norms_M2: Tensor) -> Tensor:
    """Return how far latents are the second model's own: `r = ‖d_other‖ / (‖d_first‖ + ‖d_other‖)`, `[L]`.

    It is 0 where a latent is written to the first model alone, 0.5 where both have the same of it, 1 where it is
    written to the second alone (Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing").
    Latents without a decoder row are left out.

    Args:
        norms_M2: From `part_norms`, of a crosscoder of two models.
    """
    total_M = norms_M2.sum(1)
    return norms_M2[total_M > 0, 1] / total_M[total_M > 0]


def sharing(decoder_MD: Tensor, widths: Mapping[str, int], scale_D: Tensor | None) -> Sharing:
    """Count which hookpoints latents are written to.

    Args:
        decoder_MD: `[M, D]`, float32.
        widths: By hookpoint, in the order of the columns.
        scale_D: See `scales_of`.
    """
    scales = scales_of(decoder_MD, list(widths.values()), scale_D)
    norms_MH = part_norms(decoder_MD, list(widths.values()), scales)
    largest_M1 = norms_MH.amax(1, keepdim=True)
    written_MH = (norms_MH >= WRITTEN * largest_M1) & (largest_M1 > 0)
    count_M = written_MH.sum(1)
    relative = None
    if any(name.startswith(OTHER) for name in widths):
        relative = tuple(map(int, torch.histc(relative_norms(norms_MH), RELATIVE_BINS, 0, 1).tolist()))
    return Sharing(
        parts=tuple(
            Part(name, width, scales[h], norms_MH[:, h].median().item(), int((written_MH[:, h] & (count_M == 1)).sum()))
            for h, (name, width) in enumerate(widths.items())
        ),
        latents=tuple(torch.bincount(count_M, minlength=len(widths) + 1)[1:].tolist()),
        by_variance=scale_D is not None,
        relative=relative,
    )


def compared(decoder_MD: Tensor, parts: Sharing | None) -> Tensor:
    """Return decoder rows as they are compared, `[M, D]`: a crosscoder's with each hookpoint on the same scale."""
    if parts is None:
        return decoder_MD
    return evened(decoder_MD, [part.width for part in parts.parts], [part.scale for part in parts.parts])
