"""Replaces outputs and inputs of modules while a model runs, and runs a model from a block on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saekit.activations.hookpoints import find_blocks
from saekit.activations.tap import first_name, module_of, residual
from saekit.sae import Sae
from saekit.sae.output import described
from saekit.sae.storage import IN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replace = Callable[[Tensor], Tensor]
"""From activations `[B, T, D]` to what takes their place, of the same shape, in any float type."""


@contextmanager
def splice(
    model: PreTrainedModel, replacements: Mapping[str, Sae | Replace], excluded: Tensor | None = None
) -> Iterator[None]:
    """Replace outputs and inputs of modules; the hooks are gone afterwards, whatever happens.

        with saekit.splice(model, {"layers.3": sae}):
            logits = model(input_ids).logits

    Where several are replaced, the later ones see what the earlier ones left. Gradients flow through.

    Args:
        model: Any HuggingFace model, with or without a head.
        replacements: By module of its base model (`layers.3`, or `layers.3.mlp:in` for a module's input): an SAE, whose
            reconstruction replaces counted activations (`Sae.reconstruct`), or a function.
        excluded: bool `[B, T]`, True for tokens that keep their true activation; None for none.

    Raises:
        ValueError: If there is no such module, what is given for it is neither, or an SAE or a function does not suit
            the activations.

    Warns:
        UserWarning: If an SAE was trained on another model or at another module, where its files say so.
    """
    if not isinstance(replacements, Mapping):
        given = type(replacements).__name__
        raise ValueError(f"replacements is a {given}: give what replaces which module by its name")
    modules = {name: module_of(model, str(name).removesuffix(IN)) for name in replacements}
    for name, replace in replacements.items():
        for text in _misplaced(model, name, replace):
            warnings.warn(text, UserWarning, stacklevel=3)
    handles: list[Any] = []
    try:
        for name, module in modules.items():
            new = _replacing(name, _function(name, replacements[name]), excluded)
            if name.endswith(IN):
                handles.append(module.register_forward_pre_hook(_before(name, new), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(lambda _module, _args, output, new=new: new(output)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _misplaced(model: PreTrainedModel, name: str, replace: Sae | Replace) -> Iterator[str]:
    """Say where an SAE was trained, if its files say so and it was not there."""
    known = replace.trained_on if isinstance(replace, Sae) else None
    if known is None:
        return
    if not known.is_at(name):
        yield f"the SAE that is spliced in at {name} was trained at {known.hookpoint}"
    own = model.name_or_path
    if not known.is_of(own, type(model).__name__):
        yield f"the SAE that is spliced in at {name} was trained on {known.model}, and this model is {own}"


def _function(name: str, replace: Sae | Replace) -> Replace:
    if isinstance(replace, Sae):
        return _reconstruction(name, replace)
    if not callable(replace):
        raise ValueError(f"{name}: a {type(replace).__name__} cannot replace activations: give an Sae or a function")
    return replace


def _reconstruction(name: str, sae: Sae) -> Replace:
    def reconstruct(acts: Tensor) -> Tensor:
        if acts.shape[-1] != sae.d_in:
            raise ValueError(f"{name}: the SAE is for a width of {sae.d_in}, and the activations are {described(acts)}")
        return sae.reconstruct(acts)

    return reconstruct


def _before(name: str, new: Callable[[Any], Any]) -> Callable[..., Any]:
    """Replace a module's first argument."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (new(args[0]), *args[1:]), kwargs
        first = first_name(module)
        if first not in kwargs:
            raise ValueError(f"{name}: the module is given nothing that could be replaced")
        return args, {**kwargs, first: new(kwargs[first])}

    return hook


def _replacing(name: str, replace: Replace, excluded: Tensor | None) -> Callable[[Any], Any]:
    """From what a module gives or reads to the same with other activations."""

    def replaced(output: Any) -> Any:
        acts = residual(output)
        new = replace(acts)
        if not isinstance(new, Tensor) or new.shape != acts.shape:
            raise ValueError(f"{name}: expected {list(acts.shape)} in its place, got {described(new)}")
        new = new.to(acts)
        if excluded is not None:
            new = torch.where(excluded.to(acts.device)[..., None], acts, new)
        return _with_residual(output, new)

    return replaced


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
