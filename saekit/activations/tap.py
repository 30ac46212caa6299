"""Read the residual stream after chosen blocks while a model runs, and stop the model after the last of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    """
    base, no_cache = model.base_model, without_cache(model.base_model)
    captured: dict[str, Tensor] = {}

    at_work = False

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if not at_work:
                return
            captured[name] = residual(output)
            if len(captured) == len(hookpoints):
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
        taken = {name: captured[name] for name in hookpoints}
        captured.clear()
        return taken

    was_training = model.training
    handles = [base.get_submodule(name).register_forward_hook(hook_for(name)) for name in hookpoints]
    model.eval()
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return arguments that keep a forward pass from caching keys and values, which nothing would read."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def residual(output: Any) -> Tensor:
    """Return the residual stream in a block's output: the output itself, or the first of several."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output
