"""Replace outputs and inputs of modules while a model runs, and run a model from a given block on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from saekit.activations.hookpoints import find_blocks
from saekit.activations.sites import Site, site_of
from saekit.activations.tap import first_argument, first_name, module_of, residual
from saekit.sae import Sae
from saekit.sae.output import described
from saekit.sae.storage import IN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Replace = Callable[[Tensor], Tensor]
"""Maps activations `[B, T, D]` to their replacement, of the same shape and any float type."""


class Predict(NamedTuple):
    """A replacement computed from other activations of the same forward pass."""

    reads: tuple[str, ...]
    """The hookpoints that are read. All of them must come before the one that is replaced."""
    function: Callable[[Tensor, Tensor], Tensor]
    """Maps the concatenated input, `[B, T, D]`, and the true target, `[B, T, D_out]`, to the replacement."""


@contextmanager
def splice(
    model: PreTrainedModel, replacements: Mapping[str, Sae | Replace | Predict], excluded: Tensor | None = None
) -> Iterator[None]:
    """Replace outputs and inputs of modules. The hooks are always removed afterwards.

        with saekit.splice(model, {"layers.3": sae}):
            logits = model(input_ids).logits

    A transcoder replaces its target by its prediction from its input in the same forward pass:

        with saekit.splice(model, {"layers.3.mlp": transcoder}):
            logits = model(input_ids).logits

    With several replacements, later modules see the effect of earlier replacements. Gradients flow through.

    Args:
        model: Any HuggingFace model, with or without a head.
        replacements: Replacements by module of the base model (`layers.3`, or `layers.3.mlp:in` for a module's input).
            Each is an SAE or a transcoder, whose reconstruction replaces counted activations (`Sae.reconstruct`), or a
            function. A transcoder reads the hookpoint that its files name, or the input of the module.
        excluded: bool `[B, T]`, True for tokens that keep their true activation. None excludes no token.

    Raises:
        ValueError: If a module does not exist, if a replacement has the wrong type or does not fit the activations, if
            it is a crosscoder (which reads later layers than it replaces), or if a transcoder's input comes after its
            target.

    Warns:
        UserWarning: If an SAE's files say that it was trained on another model or at another module.
    """
    if not isinstance(replacements, Mapping):
        given = type(replacements).__name__
        raise ValueError(f"replacements is a {given}: pass a dict from modules' names to their replacements")
    functions = {str(name): _function(str(name), replace) for name, replace in replacements.items()}
    modules = {name: module_of(model, _path(name)) for name in functions}
    read = {name: module_of(model, _path(name)) for each in functions.values() for name in _reads(each)}
    for name, replace in replacements.items():
        for text in _misplaced(model, name, replace):
            warnings.warn(text, UserWarning, stacklevel=3)
    handles: list[Any] = []
    try:
        recorders: dict[str, list[Callable[[Tensor], None]]] = {name: [] for name in read}
        for name, module in modules.items():
            function = functions[name]
            if isinstance(function, Predict):
                pending = _PendingPrediction(name, function)
                for hookpoint in function.reads:
                    recorders[hookpoint].append(pending.recorder(hookpoint))
                function = pending
            new = _replacing(name, function, excluded)
            if _is_input(name):
                handles.append(module.register_forward_pre_hook(_before(name, new), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(lambda _module, _args, output, new=new: new(output)))
        for name, module in read.items():  # after the other hooks, so as to read what they return
            handles.append(_listen(name, module, recorders[name]))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _path(name: str) -> str:
    return name.partition("/")[0].removesuffix(IN)


def _is_input(name: str) -> bool:
    return name.partition("/")[0].endswith(IN)


def _reads(function: Replace | Predict) -> tuple[str, ...]:
    return function.reads if isinstance(function, Predict) else ()


def _listen(name: str, module: nn.Module, recorders: list[Callable[[Tensor], None]]) -> Any:
    """Pass a hookpoint's activations in each forward pass to the functions that read it."""

    def dispatch(given: Any) -> None:
        acts = residual(given)
        for record in recorders:
            record(acts)

    if _is_input(name):
        return module.register_forward_pre_hook(
            lambda own, args, kwargs: dispatch(first_argument(own, args, kwargs)), with_kwargs=True
        )
    return module.register_forward_hook(lambda _module, _args, output: dispatch(output))


class _PendingPrediction:
    """Keeps the input of a prediction until the model reaches the target. Implements `Replace`."""

    def __init__(self, name: str, predict: Predict) -> None:
        self.name, self.predict = name, predict
        self.seen: dict[str, Tensor] = {}

    def recorder(self, hookpoint: str) -> Callable[[Tensor], None]:
        def record(acts: Tensor) -> None:
            self.seen[hookpoint] = acts.clone()  # the model may later change it in place

        return record

    def __call__(self, acts: Tensor) -> Tensor:
        missing = [hookpoint for hookpoint in self.predict.reads if hookpoint not in self.seen]
        if missing:
            raise ValueError(f"{self.name} cannot be predicted from {missing[0]}, which comes after it")
        x = [self.seen.pop(hookpoint) for hookpoint in self.predict.reads]
        return self.predict.function(x[0] if len(x) == 1 else torch.cat(x, -1), acts)


def _misplaced(model: PreTrainedModel, name: str, replace: Sae | Replace | Predict) -> Iterator[str]:
    """Yield warnings if a coder's files say that it was trained elsewhere."""
    known = replace.trained_on if isinstance(replace, Sae) else None
    if known is None or not isinstance(replace, Sae):
        return
    what = f"the {site_of(name, replace).kind} that is spliced in at {name}"
    if not known.is_at(name):
        yield f"{what} was trained at {known.hookpoint}"
    own = model.name_or_path
    if not known.is_of(own, type(model).__name__):
        yield f"{what} was trained on {known.model}, but this model is {own}"


def _function(name: str, replace: Sae | Replace | Predict) -> Replace | Predict:
    if isinstance(replace, Predict):
        return replace
    if isinstance(replace, Sae):
        return _reconstruction(site_of(name, replace), replace)
    if not callable(replace):
        raise ValueError(f"{name}: a {type(replace).__name__} cannot replace activations: pass an Sae or a function")
    return replace


def _reconstruction(site: Site, sae: Sae) -> Replace | Predict:
    name, kind = site.name, site.kind
    if site.of_two_models:
        raise ValueError(
            f"{name}: a crosscoder of two models reads both, so it cannot be spliced into one. Use saekit.evaluate, or "
            "read both models with saekit.tap and splice in each one's part of sae(x).recon as a function"
        )
    if kind == "crosscoder":
        raise ValueError(
            f"{name}: a crosscoder reads later layers than it writes, so one forward pass cannot splice it in. Use "
            "saekit.evaluate, or read with saekit.tap and splice in each hookpoint's part of sae(x).recon as a function"
        )

    def reconstruct(acts: Tensor, target: Tensor | None = None) -> Tensor:
        for given, width in ((acts, sae.d_in), (acts if target is None else target, sae.d_out)):
            if given.shape[-1] != width:
                raise ValueError(
                    f"{name}: the {kind} is for a width of {width}, but the activations are {described(given)}"
                )
        return sae.reconstruct(acts, target)

    return Predict(tuple(each.name for each in site.reads), reconstruct) if site.transcodes else reconstruct


def _before(name: str, new: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a hook that replaces a module's first argument."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (new(args[0]), *args[1:]), kwargs
        first = first_name(module)
        if first not in kwargs:
            raise ValueError(f"{name}: the module gets no argument {first!r} that could be replaced")
        return args, {**kwargs, first: new(kwargs[first])}

    return hook


def _replacing(name: str, replace: Replace, excluded: Tensor | None) -> Callable[[Any], Any]:
    """Return a function that replaces the activations in a module's output or first argument."""

    def replaced(output: Any) -> Any:
        acts = residual(output)
        new = replace(acts)
        if not isinstance(new, Tensor) or new.shape != acts.shape:
            raise ValueError(f"{name}: the replacement must have shape {list(acts.shape)}, got {described(new)}")
        new = new.to(acts)
        if excluded is not None:
            new = torch.where(excluded.to(acts.device)[..., None], acts, new)
        return _with_residual(output, new)

    return replaced


def _with_residual(output: Any, new: Tensor) -> Any:
    """Return an output with another residual stream in place of its own, the inverse of `residual`."""
    if isinstance(output, Tensor):
        return new
    return type(output)((_with_residual(output[0], new), *output[1:]))


@contextmanager
def start_after(model: PreTrainedModel, hookpoint: str, acts: Tensor) -> Iterator[None]:
    """Make a block output `acts`, and skip the computation of this and all earlier blocks.

    The rest of the model (embeddings, positions, masks, the head) runs as usual. The result is wrong if later blocks
    read more than the residual stream from earlier ones, such as shared keys and values. Callers therefore compare it
    once with a run of the whole model.

    Args:
        model: Any HuggingFace model.
        hookpoint: The block.
        acts: Its output, `[B, T, D]`.
    """
    blocks = find_blocks(model)
    names = [blocks.hookpoint(layer) for layer in range(len(blocks.modules))]
    idle = list(blocks.modules)[: names.index(hookpoint) + 1]
    # A library may already have set a block's own `forward`.
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
