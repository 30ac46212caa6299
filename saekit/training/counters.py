"""Which latents are dead, and how often each fires."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerCounters:
    """What is counted for one layer's latents; whole tensors, the same on every rank that has the layer.

    When a latent *fires* on a token its selection says: being chosen with a value of zero is not firing. It is *dead*
    when it fired for none of the last `dead_feature_threshold` tokens.
    """

    tokens_since_fired_M: Tensor
    """int64 `[M]`: tokens of training since the optimiser step in which the latent last fired."""
    fire_count_M: Tensor
    """int64 `[M]`: tokens on which the latent fired, over the whole run."""
    fired_now_M: Tensor
    """int64 `[M]`: the same, over the current optimiser step and this rank's tokens."""

    @classmethod
    def fresh(cls, num_latents: int, device: torch.device) -> LayerCounters:
        """All zero: nothing has had the time to die."""
        return cls(*(torch.zeros(num_latents, dtype=torch.int64, device=device) for _ in range(3)))

    def observe(self, fired_NK: Tensor, indices_NK: Tensor) -> None:
        """Note which latents fired in a chunk of tokens; both are `SaeOutput`'s."""
        self.fired_now_M.scatter_add_(0, indices_NK.flatten(), fired_NK.flatten().long())

    def after(self, fired_M: Tensor, tokens: int) -> LayerCounters:
        """The counters as they will be if the optimiser step that is under way counts.

        Args:
            fired_M: `fired_now_M`, summed over all ranks that share the layer.
            tokens: Tokens of the step over all those ranks.
        """
        return LayerCounters(
            tokens_since_fired_M=(self.tokens_since_fired_M + tokens).masked_fill_(fired_M > 0, 0),
            fire_count_M=self.fire_count_M + fired_M,
            fired_now_M=torch.zeros_like(self.fired_now_M),
        )

    def forget(self) -> None:
        """Leave out the optimiser step that is under way."""
        self.fired_now_M.zero_()

    def count_dead(self, threshold: int) -> Tensor:
        """How many latents are dead, given the threshold in tokens: an int64 scalar."""
        return (self.tokens_since_fired_M >= threshold).sum()

    def is_dead(self, threshold: int) -> Tensor:
        """Which latents are dead, bool `[M]`."""
        return self.tokens_since_fired_M >= threshold

    def dead(self, threshold: int, count: int) -> Tensor:
        """Numbers of the dead latents, int64 `[count]`; who knows how many they are need not wait for a GPU."""
        return torch.nonzero_static(self.tokens_since_fired_M >= threshold, size=count).squeeze(1)

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint, taken between two optimiser steps."""
        return {"tokens_since_fired": self.tokens_since_fired_M, "fire_count": self.fire_count_M}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.tokens_since_fired_M.copy_(state["tokens_since_fired"])
        self.fire_count_M.copy_(state["fire_count"])
