"""Replaces the residual stream while a model runs, and runs a model from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saekit.activations.hookpoints import find_blocks
from saekit.activations.tap import residual
from saekit.sae import Sae

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replace = Callable[[Tensor], Tensor]
"""From a block's output `[B, T, D]` to what the next block reads instead, of the same shape, in any float type."""


@contextmanager
def splice(
    model: PreTrainedModel, replacements: Mapping[str, Sae | Replace], excluded: Tensor | None = None
) -> Iterator[None]:
    """Replace the outputs of blocks; the hooks are gone afterwards, whatever happens.

        with saekit.splice(model, {"layers.3": sae}):
            logits = model(input_ids).logits

    Where several blocks are replaced, the later ones see what the earlier ones left. Gradients flow through.

    Args:
        model: Any HuggingFace model, with or without a head.
        replacements: By module of its base model (`layers.3`): an SAE, whose reconstruction replaces counted
            activations (`Sae.reconstruct`), or a function.
        excluded: bool `[B, T]`, True for tokens that keep their true activation; None for none.
    """
    handles: list[Any] = []
    try:
        for name, replace in replacements.items():
            module = model.base_model.get_submodule(name)
            handles.append(module.register_forward_hook(_hook(_function(replace), excluded)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _function(replace: Sae | Replace) -> Replace:
    if not isinstance(replace, Sae):
        return replace
    return replace.reconstruct


def _hook(replace: Replace, excluded: Tensor | None) -> Callable[..., Any]:
    def hook(_module: Any, _args: Any, output: Any) -> Any:
        acts = residual(output)
        new = replace(acts).to(acts)
        if excluded is not None:
            new = torch.where(excluded.to(acts.device)[..., None], acts, new)
        return _with_residual(output, new)

    return hook


def _with_residual(output: Any, new: Tensor) -> Any:
    """Return the inverse of `residual`: the same output with another residual stream in it."""
    if isinstance(output, Tensor):
        return new
    return type(output)((_with_residual(output[0], new), *output[1:]))


@contextmanager
def start_behind(model: PreTrainedModel, hookpoint: str, acts: Tensor) -> Iterator[None]:
    """Let a block give `acts`, and neither it nor the blocks before it compute anything.

    The rest of the model (embeddings, positions, masks, the head) runs as usual. This is wrong for a model in which
    later blocks read more than the residual stream from earlier ones (shared keys and values, for example): callers
    compare it once with a run of the whole model.

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
