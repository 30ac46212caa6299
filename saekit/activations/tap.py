"""Read the residual stream after chosen blocks while a model runs, and stop the model after the last of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _LastTapReached(BaseException):
    """Ends a forward pass whose rest is not needed. Not an `Exception`, so that no model code swallows it."""


@contextmanager
def tap(model: PreTrainedModel, hookpoints: Sequence[str]) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Hook the outputs of blocks; the hooks are gone afterwards, whatever happens.

    Between two calls of the function the model can be run in any other way: the hooks are at rest then.

    The block's own output is read, not the model's `hidden_states`, whose last entry has gone through the final norm.

    Args:
        model: Any HuggingFace model; it is put in eval mode for the duration and restored.
        hookpoints: Modules of its base model, in the order in which they run: `layers.0`, `layers.3`, ...

    Yields:
        A function that runs the base model on `input_ids` `[B, T]` (and keyword arguments), up to the last hookpoint,
        and returns each hookpoint's activations `[B, T, D]`. They are inference tensors: copy before using them in
        autograd (indexing copies).

    Raises:
        ValueError: If there is no such module, or one does not run.
    """
    if isinstance(hookpoints, str):
        raise ValueError(f"hookpoints is the text {hookpoints!r}: give a list, such as [{hookpoints!r}]")
    modules = {name: module_of(model, name) for name in hookpoints}
    base, no_cache = model.base_model, without_cache(model.base_model)
    captured: dict[str, Tensor] = {}

    at_work = False

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if not at_work:
                return
            captured[name] = residual(output)
            if len(captured) == len(modules):
                raise _LastTapReached

        return hook

    # A sharded model's parameters get new data whenever they are gathered, which inference tensors cannot become.
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())

    @(torch.no_grad() if sharded else torch.inference_mode())
    def run(input_ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        nonlocal at_work
        captured.clear()
        at_work = True
        try:
            with suppress(_LastTapReached):
                base(input_ids=input_ids, **{**no_cache, **kwargs})
        finally:
            at_work = False
        idle = [name for name in modules if name not in captured]
        if idle:
            raise ValueError(f"{', '.join(idle)} did not run in the forward pass of {type(base).__name__}")
        taken = {name: captured[name] for name in modules}
        captured.clear()
        return taken

    was_training = model.training
    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    model.eval()
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


def module_of(model: PreTrainedModel, name: str) -> nn.Module:
    """Return a module of a model's base model by its path.

    Raises:
        ValueError: If there is none; the message says which there are where the path goes wrong.
    """
    base = getattr(model, "base_model", None)
    if base is None:
        raise ValueError(f"model is a {type(model).__name__}: give a model of transformers that is loaded")
    where, module = "", base
    for part in str(name).split("."):
        children = {name: child for name, child in module._modules.items() if child is not None}
        if part not in children:
            own = _listed(list(children)) or "no modules"
            raise ValueError(f"{name!r} is no module of {type(base).__name__}: {where or 'it'} has {own}")
        where, module = f"{where}.{part}".lstrip("."), children[part]
    return module


def _listed(names: Sequence[str]) -> str:
    """Return names in a row; those of a list of blocks as a range."""
    if len(names) > 2 and all(name.isdecimal() for name in names):
        return f"{names[0]} to {names[-1]}"
    return ", ".join(names)


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return arguments that keep a forward pass from caching keys and values, which nothing would read."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def residual(output: Any) -> Tensor:
    """Return the residual stream in a block's output: the output itself, or the first of several.

    Raises:
        ValueError: If there is no tensor.
    """
    found = output
    while not isinstance(found, Tensor):
        try:
            found = found[0]
        except (TypeError, KeyError, IndexError):
            raise ValueError(f"a module gives a {type(output).__name__} without a tensor of activations") from None
    return found
