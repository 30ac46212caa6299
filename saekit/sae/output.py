"""The outputs of an SAE."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """A sparse code: the active latents of each token and their values. K is `Sae.max_active`."""

    acts: Tensor
    """`[..., K]`: values in the selection's order (for TopK, largest first). Zero for places that are not used."""
    indices: Tensor
    """`[..., K]`, int64: indices of the latents."""


class SaeOutput(NamedTuple):
    """The output of one forward pass. The leading dimensions are those of the input."""

    recon: Tensor
    """`[..., D]`: the reconstruction `x̂`."""
    acts: Tensor
    """`[..., K]`: values of the active latents."""
    indices: Tensor
    """`[..., K]`, int64: their indices."""
    fired: Tensor
    """`[..., K]`, bool: which of these values count as firings (`Selection.fired`)."""
    aux_recon: Tensor | None = None
    """`[..., D]`: the dead latents' prediction of `x - x̂`, without `b_dec`. None if AuxK is off."""
    multi_recon: Tensor | None = None
    """`[..., D]`: the reconstruction from `4k` latents. None if Multi-TopK is off."""
    prefix_recons: tuple[Tensor, ...] = ()
    """`[..., D]` each: reconstructions from the active latents of each smaller prefix, in a Matryoshka's training."""
    dead_biases: Tensor | None = None
    """The sum of the dead latents' `b_enc`, a scalar. None if no loss raises them."""
    sums: Tensor | None = None
    """`[..., num_sums]`, int64: the result of `Selection.sums`, for `Selection.move_`. None if that does nothing."""
    penalty: Tensor | None = None
    """`[...]`: the selection's own loss term for each token. None if it has none."""
    counted: Tensor | None = None
    """`[..., 1]`, bool: False for excluded tokens (`masked`). None if no token is excluded."""

    def masked(self, counted: Tensor | None) -> SaeOutput:
        """Set the output for excluded tokens to zero, so that they give no gradient.

        Args:
            counted: Bool `[..., 1]`, False for excluded tokens. None excludes no token.
        """
        if counted is None:
            return self

        def mask(each: Tensor | None) -> Tensor | None:
            return None if each is None else each * counted

        return self._replace(
            recon=self.recon * counted,
            acts=self.acts * counted,
            fired=self.fired & counted,
            aux_recon=mask(self.aux_recon),
            multi_recon=mask(self.multi_recon),
            prefix_recons=tuple(each * counted for each in self.prefix_recons),
            sums=mask(self.sums),
            penalty=None if self.penalty is None else self.penalty * counted.squeeze(-1),
            counted=counted,
        )


def described(value: Any) -> str:
    """Describe a tensor's shape, or the type of a value that is not a tensor, for a message."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {list(value.shape)}"


def check_code(acts: Any, indices: Any, num_latents: int) -> None:
    """Check that two tensors are a code that a dictionary of M latents can decode.

    Raises:
        ValueError: If their types or shapes do not fit, or (checked on a CPU only) an index is out of range.
    """
    for name, each in (("acts", acts), ("indices", indices)):
        if not isinstance(each, Tensor) or each.ndim == 0:
            raise ValueError(f"expected {name} [..., K], got {described(each)}")
    if acts.shape != indices.shape:
        raise ValueError(f"acts and indices must have the same shape, got {list(acts.shape)} and {list(indices.shape)}")
    if indices.dtype != torch.int64:
        raise ValueError(f"indices must be int64, got {indices.dtype}")
    if indices.device.type == "cpu" and indices.numel():
        least, most = int(indices.min()), int(indices.max())
        if least < 0 or most >= num_latents:
            raise ValueError(f"indices range from {least} to {most}, but this SAE has latents 0 to {num_latents - 1}")
