"""Frames: the units in which transcoders and crosscoders are trained, and the conversion of their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saekit.activations.sites import Site


@dataclass(frozen=True)
class Frame:
    """Maps activations to what a unit in training sees.

    A transcoder's input is centred and scaled to about the size of the target, so that learning rates and biases have
    the sizes that they have for an SAE. The scale is a power of two, so weights are converted there and back without
    rounding. A crosscoder's hookpoints are each scaled to the same variance.

    `fold` converts weights that were trained in this frame to weights for activations as they are.
    """

    scale_D: Tensor
    """`[D]`: the factor on the input. A crosscoder's target is its input, so it has the same factor."""
    rms: float
    """Root mean square of the input as the unit sees it. The biases have this unit."""
    shift_D: Tensor | None = None
    """`[D]`: subtracted from a transcoder's input before scaling. None for a crosscoder, which subtracts `b_dec`."""

    def split(self, chunk_NW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a chunk `[N, W]` into the input, `[N, D]`, and a transcoder's target, `[N, D_out]`, or None."""
        d_in = len(self.scale_D)
        return (chunk_NW, None) if self.shift_D is None else (chunk_NW[:, :d_in], chunk_NW[:, d_in:])

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return the input, `[N, D]`, as the unit sees it."""
        return (x_ND if self.shift_D is None else x_ND - self.shift_D) * self.scale_D

    def to(self, device: torch.device) -> Frame:
        """Return the frame with its tensors on a device."""
        shift_D = None if self.shift_D is None else self.shift_D.to(device)
        return replace(self, scale_D=self.scale_D.to(device), shift_D=shift_D)

    def fold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights for activations as they are, by parameter name. Unchanged tensors are not copied."""
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
        """Return weights for this frame from weights for activations as they are: inverts `fold` up to rounding."""
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

    def inexact(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that `unfold` would round. To resume exactly, a checkpoint keeps them with the folded."""
        if self.shift_D is None:
            names = ["W_enc", "W_dec", "b_dec"]
        else:
            names = ["b_enc", "b_dec"] if "W_skip" in weights else ["b_enc"]
        return {name: weights[name] for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps of the frame."""
        kept = {"scale": self.scale_D, "rms": torch.tensor(self.rms, dtype=torch.float64)}
        return kept if self.shift_D is None else {**kept, "shift": self.shift_D}


def frame_of(site: Site, tensors: Mapping[str, Tensor]) -> Frame | None:
    """Return the frame that a checkpoint kept as these tensors; None for an SAE."""
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
    """Tell whether a site's coder is trained in a frame: transcoders and crosscoders are, SAEs are not."""
    return site.transcodes or len(site.reads) > 1


def transcoder_frame(d_in: int, mean_D: Tensor, variance: float, rms_out: float) -> Frame:
    """Return a transcoder's frame.

    Args:
        d_in: D.
        mean_D: `[D]`, the mean of its input.
        variance: The total variance of its input.
        rms_out: Root mean square of its centred target.
    """
    rms = (variance / d_in) ** 0.5
    scale = 2.0 ** round(math.log2(rms_out / rms))
    return Frame(torch.full((d_in,), scale), rms * scale, mean_D)


def crosscoder_frame(widths: Sequence[int], variances: Sequence[float]) -> Frame:
    """Return a crosscoder's frame.

    Args:
        widths: D of each hookpoint.
        variances: The total variance of each.
    """
    each = sum(widths) / len(widths)
    scales = [(each / variance) ** 0.5 for variance in variances]
    scale_D = torch.cat([torch.full((width,), scale) for width, scale in zip(widths, scales, strict=True)])
    return Frame(scale_D, 1.0)
