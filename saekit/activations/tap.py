"""Read outputs and inputs of chosen modules while a model runs, and stop the model after the last one."""

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
    """Ends a forward pass whose rest is not needed. Not an `Exception`, so that no model code catches it."""


@contextmanager
def tap(model: PreTrainedModel, hookpoints: Sequence[str]) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Hook outputs and inputs of modules. The hooks are always removed afterwards.

    The hooks only act during a call of the yielded function. Between calls, the model can be used in any way.

    For a block, the hook reads the block's own output, not the model's `hidden_states`, whose last entry comes after
    the final norm. A module's input is its first argument. The first call detects activations that the model later
    changes in place; these are copied when they are read.

    Args:
        model: Any HuggingFace model. It is in eval mode meanwhile, and its mode is restored afterwards.
        hookpoints: Modules of the base model, such as `layers.0` and `layers.3.mlp`, for their outputs, or with `:in`
            after the path for their inputs.

    Yields:
        A function that runs the base model on `input_ids` `[B, T]` (and keyword arguments) up to the last hookpoint,
        and returns each hookpoint's activations `[B, T, D]`. From the second call on, these are inference tensors: copy
        them before using them in autograd (indexing copies).

    Raises:
        ValueError: If a module does not exist or does not run, or if its output or input is not a tensor `[B, T, D]`.
    """
    if isinstance(hookpoints, str):
        raise ValueError(f"hookpoints is the string {hookpoints!r}: pass a list, such as [{hookpoints!r}]")
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
            raise ValueError(f"{name} cannot be read: it is {described(acts)}, not [batch, tokens, width]")
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

    # Gathering a sharded model's parameters changes their data, which inference tensors do not allow.
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())

    @(torch.no_grad() if sharded else torch.inference_mode())
    def run(input_ids: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        nonlocal changed
        if changed is None:
            with torch.inference_mode(False), torch.no_grad():  # inference tensors have no version counter
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
        ValueError: If there is no such module. The message lists the modules where the path goes wrong.
    """
    base = getattr(model, "base_model", None)
    if base is None:
        raise ValueError(f"model is a {type(model).__name__}: pass a loaded transformers model")
    where, module = "", base
    for part in str(name).split("."):
        children = {name: child for name, child in module._modules.items() if child is not None}
        if part not in children:
            own = _listed(list(children)) or "no modules"
            raise ValueError(f"{name!r} is not a module of {type(base).__name__}: {where or 'it'} has {own}")
        where, module = f"{where}.{part}".lstrip("."), children[part]
    return module


def _listed(names: Sequence[str]) -> str:
    """Join names with commas, or give a range if they are the numbers of a list of blocks."""
    if len(names) > 2 and all(name.isdecimal() for name in names):
        return f"{names[0]} to {names[-1]}"
    return ", ".join(names)


def first_argument(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return a module's input, the first argument of its `forward`, given by position or by name. None without one."""
    return args[0] if args else kwargs.get(first_name(module))


def first_name(module: nn.Module) -> str:
    """Return the name of the first argument of a module's `forward`. Empty if it takes none."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return arguments that stop a forward pass from caching keys and values, which nobody would use."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def residual(output: Any) -> Tensor:
    """Return the activations in a module's output: the output itself, or its first element.

    Raises:
        ValueError: If the output has no tensor there.
    """
    found = output
    while not isinstance(found, Tensor):
        try:
            found = found[0]
        except (TypeError, KeyError, IndexError):
            raise ValueError(
                f"a module's output is a {type(output).__name__} without a tensor of activations"
            ) from None
    return found
