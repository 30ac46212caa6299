"""Frames: the units in which a transcoder or a crosscoder is trained, and its weights in the activations' own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saekit.activations.sites import Site


@dataclass(frozen=True)
class Frame:
    """How a unit in training sees its activations.

    A transcoder's input is centred, and scaled so that it is about as large as the target: all rates and the
    biases then have the sizes that they have for an SAE. The scale is a power of two, so that weights can be brought
    from one unit to the other and back without rounding. Of a crosscoder each hookpoint is scaled to the same variance.

    `fold` turns weights that were trained in this frame into weights for activations as they are.
    """

    scale_D: Tensor
    """`[D]`, by which the input is multiplied; a crosscoder's target, which is its input, too."""
    rms: float
    """Root mean square of the input as the unit sees it: the biases' unit."""
    shift_D: Tensor | None = None
    """`[D]`, what is subtracted from a transcoder's input before; None for a crosscoder, which subtracts `b_dec`."""

    def split(self, chunk_NW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the input, `[N, D]`, and a transcoder's target, `[N, D_out]`, of what has come."""
        d_in = len(self.scale_D)
        return (chunk_NW, None) if self.shift_D is None else (chunk_NW[:, :d_in], chunk_NW[:, d_in:])

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return the input, `[N, D]`, as the unit sees it."""
        return (x_ND if self.shift_D is None else x_ND - self.shift_D) * self.scale_D

    def to(self, device: torch.device) -> Frame:
        """Return the same on a device."""
        shift_D = None if self.shift_D is None else self.shift_D.to(device)
        return replace(self, scale_D=self.scale_D.to(device), shift_D=shift_D)

    def fold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights for activations as they are, by parameter name; those that are the same are not copied."""
        folded = dict(weights)
        scale_D = self.scale_D.to(weights["W_enc"].device)
        folded["W_enc"] = weights["W_enc"] * scale_D
        if self.shift_D is None:
            return folded | {"W_dec": weights["W_dec"] / scale_D, "b_dec": weights["b_dec"] / scale_D}
        shift_D = self.shift_D.to(scale_D)
        folded["b_enc"] = weights["b_enc"] - folded["W_enc"] @ shift_D
        if "W_skip" in weights:
            folded["W_skip"] = weights["W_skip"] * scale_D
            folded["b_dec"] = weights["b_dec"] - folded["W_skip"] @ shift_D
        return folded

    def unfold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inverse of `fold`, up to rounding."""
        own = dict(weights)
        scale_D = self.scale_D.to(weights["W_enc"].device)
        own["W_enc"] = weights["W_enc"] / scale_D
        if self.shift_D is None:
            return own | {"W_dec": weights["W_dec"] * scale_D, "b_dec": weights["b_dec"] * scale_D}
        shift_D = self.shift_D.to(scale_D)
        own["b_enc"] = weights["b_enc"] + weights["W_enc"] @ shift_D
        if "W_skip" in weights:
            own["W_skip"] = weights["W_skip"] / scale_D
            own["b_dec"] = weights["b_dec"] + weights["W_skip"] @ shift_D
        return own

    def lost(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that `unfold` would round: an exact continuation needs them next to the folded ones."""
        if self.shift_D is None:
            names = ["W_enc", "W_dec", "b_dec"]
        else:
            names = ["b_enc", "b_dec"] if "W_skip" in weights else ["b_enc"]
        return {name: weights[name] for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of it."""
        kept = {"scale": self.scale_D, "rms": torch.tensor(self.rms, dtype=torch.float64)}
        return kept if self.shift_D is None else {**kept, "shift": self.shift_D}


def frame_of(site: Site, tensors: Mapping[str, Tensor]) -> Frame | None:
    """Return the frame of which a checkpoint kept these tensors; None for an SAE."""
    if not needs_frame(site):
        return None
    return Frame(tensors["scale"], float(tensors["rms"]), tensors.get("shift"))


def framed(rows_NW: Tensor, frame: Frame | None) -> tuple[Tensor, Tensor | None]:
    """Return the input, `[N, D]`, as a unit sees it, and a transcoder's target, `[N, D_out]`.

    Args:
        rows_NW: The input, followed by the target for a transcoder.
        frame: The unit's; None for an SAE.
    """
    if frame is None:
        return rows_NW, None
    x_ND, y_ND = frame.split(rows_NW)
    return frame.to(rows_NW.device)(x_ND), y_ND


def needs_frame(site: Site) -> bool:
    """Tell whether a site's coder is trained in another frame than the activations' own: all but an SAE are."""
    return site.transcodes or len(site.reads) > 1


def transcoders(d_in: int, mean_D: Tensor, variance: float, rms_out: float) -> Frame:
    """Return a transcoder's frame.

    Args:
        d_in: D.
        mean_D: `[D]`, the mean of what it reads.
        variance: The total variance of that.
        rms_out: Root mean square of its target, centred.
    """
    rms = (variance / d_in) ** 0.5
    scale = 2.0 ** round(math.log2(rms_out / rms))
    return Frame(torch.full((d_in,), scale), rms * scale, mean_D)


def crosscoders(widths: Sequence[int], variances: Sequence[float]) -> Frame:
    """Return a crosscoder's frame.

    Args:
        widths: D of each hookpoint.
        variances: The total variance of each.
    """
    each = sum(widths) / len(widths)
    scales = [(each / variance) ** 0.5 for variance in variances]
    scale_D = torch.cat([torch.full((width,), scale) for width, scale in zip(widths, scales, strict=True)])
    return Frame(scale_D, 1.0)
