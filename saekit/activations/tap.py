"""Read outputs and inputs of chosen modules while a model runs, and stop the model after the last of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saekit.sae.output import described
from saekit.sae.storage import IN

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _LastTapReached(BaseException):
    """Ends a forward pass whose rest is not needed. Not an `Exception`, so that no model code swallows it."""


@contextmanager
def tap(model: PreTrainedModel, hookpoints: Sequence[str]) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Hook outputs and inputs of modules; the hooks are gone afterwards, whatever happens.

    Between two calls of the function the model can be run in any other way: the hooks are at rest then.

    A block's own output is read, not the model's `hidden_states`, whose last entry has gone through the final norm. A
    module's input is its first argument. What the model changes in place after it was read, as the first call finds
    out, is copied when it is read.

    Args:
        model: Any HuggingFace model; it is put in eval mode for the duration and restored.
        hookpoints: Modules of its base model, such as `layers.0` and `layers.3.mlp`, for their outputs, and with `:in`
            behind the path for their inputs.

    Yields:
        A function that runs the base model on `input_ids` `[B, T]` (and keyword arguments), up to the last hookpoint,
        and returns each hookpoint's activations `[B, T, D]`. From the second call on they are inference tensors: copy
        before using them in autograd (indexing copies).

    Raises:
        ValueError: If there is no such module, one does not run, or what it gives or reads is no tensor `[B, T, D]`.
    """
    if isinstance(hookpoints, str):
        raise ValueError(f"hookpoints is the text {hookpoints!r}: give a list, such as [{hookpoints!r}]")
    modules = {name: module_of(model, _path(name)) for name in hookpoints}
    base, no_cache = model.base_model, without_cache(model.base_model)
    captured: dict[str, Tensor] = {}
    changed: set[str] | None = None
    versions: dict[str, int] = {}
    shape = torch.Size()

    at_work = False

    def take(name: str, given: Any) -> None:
        if not at_work:
            return
        acts = residual(given)
        if acts.shape[:-1] != shape:
            raise ValueError(f"{name} is {described(acts)}, not [batch, tokens, width]: it cannot be read")
        captured[name] = acts.clone() if changed is not None and name in changed else acts
        if changed is None:
            versions[name] = acts._version
        if len(captured) == len(modules):
            raise _LastTapReached

    def output_hook(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            take(name, output)

        return hook

    def input_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            take(name, first_argument(module, args, kwargs))

        return hook

    def forward(input_ids: Tensor, kwargs: Mapping[str, Any]) -> None:
        nonlocal at_work, shape
        captured.clear()
        at_work, shape = True, input_ids.shape
        try:
            with suppress(_LastTapReached):
                base(input_ids=input_ids, **{**no_cache, **kwargs})
        finally:
            at_work = False
        idle = [name for name in modules if name not in captured]
        if idle:
            raise ValueError(f"{', '.join(idle)} did not run in the forward pass of {type(base).__name__}")

    # A sharded model's parameters get new data whenever they are gathered, which inference tensors cannot become.
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())

    @(torch.no_grad() if sharded else torch.inference_mode())
    def run(input_ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        nonlocal changed
        if changed is None:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors do not count their changes
                forward(input_ids.clone() if input_ids.is_inference() else input_ids, kwargs)
            changed = {name for name, acts in captured.items() if acts._version != versions[name]}
            if changed:
                forward(input_ids, kwargs)
        else:
            forward(input_ids, kwargs)
        taken = {name: captured[name] for name in modules}
        captured.clear()
        return taken

    was_training = model.training
    handles: list[Any] = []
    for name, module in modules.items():
        if name.endswith(IN):
            handles.append(module.register_forward_pre_hook(input_hook(name), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(output_hook(name)))
    model.eval()
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


def _path(name: str) -> str:
    return name.removesuffix(IN) if isinstance(name, str) else name


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


def first_argument(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a module reads: the first argument of its `forward`, wherever the call has it; None without one."""
    return args[0] if args else kwargs.get(first_name(module))


def first_name(module: nn.Module) -> str:
    """Return the name of the first argument of a module's `forward`; empty if it takes none."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return arguments that keep a forward pass from caching keys and values, which nothing would read."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def residual(output: Any) -> Tensor:
    """Return the activations in a module's output: the output itself, or the first of several.

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
