"""Run a model from the middle on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saekit.activations.hookpoints import find_blocks
from saekit.activations.splice import splice

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def start_behind(model: PreTrainedModel, hookpoint: str, acts: Tensor) -> Iterator[None]:
    """Let a block give `acts`, and neither it nor the blocks before it compute anything.

    What lies outside of the blocks (embeddings, positions, masks, the head) runs as ever. A model in which later blocks
    read more of the earlier ones than the residual stream (shared keys and values, say) cannot be run so: whoever
    uses this compares it with a whole run once.

    Args:
        model: Any HuggingFace model.
        hookpoint: The block.
        acts: What it gives, `[B, T, D]`.
    """
    blocks = find_blocks(model)
    names = [blocks.hookpoint(layer) for layer in range(len(blocks.modules))]
    idle = list(blocks.modules)[: names.index(hookpoint) + 1]
    # A library may have given a block a `forward` of its own already.
    own = [block.__dict__.get("forward") for block in idle]
    try:
        for block in idle:
            block.forward = _pass_on
        with splice(model, {hookpoint: lambda _: acts}):
            yield
    finally:
        for block, forward in zip(idle, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _pass_on(*args: Any, **kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
