"""The outputs of an SAE."""

from __future__ import annotations

from typing import NamedTuple

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
