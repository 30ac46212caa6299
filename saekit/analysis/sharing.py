"""Find which hookpoints a crosscoder's latents write to, from decoder norms per hookpoint on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.activations.hookpoints import OTHER

RELATIVE_BINS = 20
"""Bins of the histogram of relative decoder norms."""
WRITTEN = 0.5
"""A latent writes to a hookpoint if its norm there is at least this share of its largest norm."""


@dataclass(frozen=True)
class Part:
    """One hookpoint of a crosscoder."""

    hookpoint: str
    width: int
    scale: float
    """The factor on decoder rows that makes them comparable between hookpoints."""
    median: float
    """The median norm of the scaled rows."""
    own: int
    """The number of latents that write only to this hookpoint."""


@dataclass(frozen=True)
class Sharing:
    """How a crosscoder's hookpoints share latents."""

    parts: tuple[Part, ...]
    latents: tuple[int, ...]
    """The number of latents that write to one hookpoint, to two, ... to all. Zero decoder rows are not counted."""
    by_variance: bool
    """Whether the scales are those of training, under which all hookpoints have the same variance. If the files do not
    have these, each hookpoint's norms are relative to their root mean square."""
    relative: tuple[int, ...] | None = None
    """For a crosscoder of two models: a histogram of latents by relative decoder norm (`relative_norms`), in
    `RELATIVE_BINS` bins from 0 to 1."""


def scales_of(decoder_MD: Tensor, widths: Sequence[int], scale_D: Tensor | None) -> list[float]:
    """Return the scale of each hookpoint.

    Args:
        decoder_MD: `[M, D]`.
        widths: The hookpoints' widths, in the order of the columns.
        scale_D: `[D]`, from the training's state. None if it is missing.
    """
    if scale_D is not None:
        return [part[0].item() for part in scale_D.split(list(widths))]
    parts = decoder_MD.split(list(widths), 1)
    return [1 / max(part.norm(dim=1).square().mean().sqrt().item(), 1e-30) for part in parts]


def part_norms(decoder_MD: Tensor, widths: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Compute the scaled norms of decoder rows at each of H hookpoints, `[M, H]`."""
    parts = zip(decoder_MD.split(list(widths), 1), scales, strict=True)
    return torch.stack([part.norm(dim=1) * scale for part, scale in parts], 1)


def evened(decoder_MD: Tensor, widths: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Return decoder rows with each hookpoint's part scaled, `[M, D]`. Rows of a single hookpoint are not changed."""
    if len(widths) < 2:
        return decoder_MD
    parts = zip(decoder_MD.split(list(widths), 1), scales, strict=True)
    return torch.cat([part * scale for part, scale in parts], 1)


def relative_norms(norms_M2: Tensor) -> Tensor:
    """Compute the relative decoder norms of latents, `r = ‖d_other‖ / (‖d_first‖ + ‖d_other‖)`, `[L]`.

    0 means that a latent writes only to the first model, 0.5 to both equally, and 1 only to the second (Lindsey et al.
    2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing"). Latents with a zero decoder row are left
    out.

    Args:
        norms_M2: `[M, 2]`, from `part_norms` for a crosscoder of two models.
    """
    total_M = norms_M2.sum(1)
    return norms_M2[total_M > 0, 1] / total_M[total_M > 0]


def sharing(decoder_MD: Tensor, widths: Mapping[str, int], scale_D: Tensor | None) -> Sharing:
    """Count which hookpoints latents write to.

    Args:
        decoder_MD: `[M, D]`, float32.
        widths: The width of each hookpoint, in the order of the columns.
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
    """Return decoder rows for comparison, `[M, D]`: a crosscoder's with all hookpoints on the same scale."""
    if parts is None:
        return decoder_MD
    return evened(decoder_MD, [part.width for part in parts.parts], [part.scale for part in parts.parts])
