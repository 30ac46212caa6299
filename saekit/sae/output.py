"""The outputs of an SAE."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """A sparse code: which latents are active for each token, and how much. K is `Sae.max_active`."""

    acts: Tensor
    """`[..., K]`, in the selection's order, for TopK the largest first; zero where fewer than K latents are active."""
    indices: Tensor
    """`[..., K]`, int64: the latents' numbers."""


class SaeOutput(NamedTuple):
    """The output of one forward pass; leading dimensions are those of the input."""

    recon: Tensor
    """`[..., D]`: the reconstruction `x̂`."""
    acts: Tensor
    """`[..., K]`: values of the active latents."""
    indices: Tensor
    """`[..., K]`, int64."""
    fired: Tensor
    """`[..., K]`, bool: which of these values count as firings (`Selection.fired`)."""
    aux_recon: Tensor | None = None
    """`[..., D]`: what dead latents predict of `x - x̂`, without `b_dec`; None when AuxK is off."""
    multi_recon: Tensor | None = None
    """`[..., D]`: the reconstruction from `4k` latents; None when Multi-TopK is off."""
    prefix_recons: tuple[Tensor, ...] = ()
    """`[..., D]` each: from the chosen latents of each smaller prefix alone; empty but in a Matryoshka's training."""
    dead_biases: Tensor | None = None
    """The sum of the dead latents' `b_enc`, a scalar; None where no loss raises them."""
    sums: Tensor | None = None
    """`[..., num_sums]`, int64: what the selection is moved by (`Selection.sums`); None where nothing moves it."""
    penalty: Tensor | None = None
    """`[...]`: the selection's own term of the loss for each token; None without one."""
    counted: Tensor | None = None
    """`[..., 1]`, bool: False for excluded tokens (`masked`); None if none is excluded."""

    def masked(self, counted: Tensor | None) -> SaeOutput:
        """Put zeros in place of the output for excluded tokens, which then have no gradient.

        Args:
            counted: Bool `[..., 1]`, False for excluded tokens; None excludes none.
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
    """Describe what was given in place of a tensor, for a message."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {list(value.shape)}"


def check_code(acts: Any, indices: Any, num_latents: int) -> None:
    """Check that two tensors are a code that a dictionary can decode.

    Raises:
        ValueError: If they are not.
    """
    for name, each in (("acts", acts), ("indices", indices)):
        if not isinstance(each, Tensor) or each.ndim == 0:
            raise ValueError(f"expected {name} [..., K], got {described(each)}")
    if acts.shape != indices.shape:
        raise ValueError(
            f"acts and indices belong together, but their shapes are {list(acts.shape)} and {list(indices.shape)}"
        )
    if indices.dtype != torch.int64:
        raise ValueError(f"indices are numbers of latents in int64, but they are {indices.dtype}")
    if indices.device.type == "cpu" and indices.numel():
        least, most = int(indices.min()), int(indices.max())
        if least < 0 or most >= num_latents:
            raise ValueError(f"indices go from {least} to {most}, but this SAE has the latents 0 to {num_latents - 1}")
