"""Replaces outputs and inputs of modules while a model runs, and runs a model from a block on."""

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
"""From activations `[B, T, D]` to what takes their place, of the same shape, in any float type."""


class Predict(NamedTuple):
    """A replacement that is computed from other activations of the same forward pass."""

    reads: tuple[str, ...]
    """The hookpoints that are read; all of them come before what is replaced."""
    function: Callable[[Tensor, Tensor], Tensor]
    """From the input, `[B, T, D]`, its hookpoints side by side, and the true target, `[B, T, D_out]`."""


@contextmanager
def splice(
    model: PreTrainedModel, replacements: Mapping[str, Sae | Replace | Predict], excluded: Tensor | None = None
) -> Iterator[None]:
    """Replace outputs and inputs of modules; the hooks are gone afterwards, whatever happens.

        with saekit.splice(model, {"layers.3": sae}):
            logits = model(input_ids).logits

    A transcoder replaces what it predicts, by its prediction from what it reads in the same forward pass:

        with saekit.splice(model, {"layers.3.mlp": transcoder}):
            logits = model(input_ids).logits

    Where several are replaced, the later ones see what the earlier ones left. Gradients flow through.

    Args:
        model: Any HuggingFace model, with or without a head.
        replacements: By module of its base model (`layers.3`, or `layers.3.mlp:in` for a module's input): an SAE or a
            transcoder, whose reconstruction replaces counted activations (`Sae.reconstruct`), or a function. A
            transcoder reads what its files say, or the input of the module.
        excluded: bool `[B, T]`, True for tokens that keep their true activation; None for none.

    Raises:
        ValueError: If there is no such module, what is given for it is neither, or an SAE or a function does not suit
            the activations; if it is a crosscoder, which reads later layers than it replaces, or if what a transcoder
            reads comes after what it predicts.

    Warns:
        UserWarning: If an SAE was trained on another model or at another module, where its files say so.
    """
    if not isinstance(replacements, Mapping):
        given = type(replacements).__name__
        raise ValueError(f"replacements is a {given}: give what replaces which module by its name")
    functions = {str(name): _function(str(name), replace) for name, replace in replacements.items()}
    modules = {name: module_of(model, _path(name)) for name in functions}
    read = {name: module_of(model, _path(name)) for each in functions.values() for name in _reads(each)}
    for name, replace in replacements.items():
        for text in _misplaced(model, name, replace):
            warnings.warn(text, UserWarning, stacklevel=3)
    handles: list[Any] = []
    try:
        takers: dict[str, list[Callable[[Tensor], None]]] = {name: [] for name in read}
        for name, module in modules.items():
            function = functions[name]
            if isinstance(function, Predict):
                waiting = _Waiting(name, function)
                for hookpoint in function.reads:
                    takers[hookpoint].append(waiting.taker(hookpoint))
                function = waiting
            new = _replacing(name, function, excluded)
            if _is_input(name):
                handles.append(module.register_forward_pre_hook(_before(name, new), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(lambda _module, _args, output, new=new: new(output)))
        for name, module in read.items():  # behind the others: what is read is what they left
            handles.append(_listen(name, module, takers[name]))
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


def _listen(name: str, module: nn.Module, takers: list[Callable[[Tensor], None]]) -> Any:
    """Hand what a hookpoint has in each forward pass to those who read it."""

    def hear(given: Any) -> None:
        acts = residual(given)
        for take in takers:
            take(acts)

    if _is_input(name):
        return module.register_forward_pre_hook(
            lambda own, args, kwargs: hear(first_argument(own, args, kwargs)), with_kwargs=True
        )
    return module.register_forward_hook(lambda _module, _args, output: hear(output))


class _Waiting:
    """What a prediction reads, kept from where it is read to where it is written. Implements `Replace`."""

    def __init__(self, name: str, predict: Predict) -> None:
        self.name, self.predict = name, predict
        self.seen: dict[str, Tensor] = {}

    def taker(self, hookpoint: str) -> Callable[[Tensor], None]:
        def take(acts: Tensor) -> None:
            self.seen[hookpoint] = acts.clone()  # the model may go on to change it in place

        return take

    def __call__(self, acts: Tensor) -> Tensor:
        missing = [hookpoint for hookpoint in self.predict.reads if hookpoint not in self.seen]
        if missing:
            raise ValueError(f"{self.name} comes before {missing[0]}, from which it is to be predicted")
        x = [self.seen.pop(hookpoint) for hookpoint in self.predict.reads]
        return self.predict.function(x[0] if len(x) == 1 else torch.cat(x, -1), acts)


def _misplaced(model: PreTrainedModel, name: str, replace: Sae | Replace | Predict) -> Iterator[str]:
    """Say where a coder was trained, if its files say so and it was not there."""
    known = replace.trained_on if isinstance(replace, Sae) else None
    if known is None or not isinstance(replace, Sae):
        return
    what = f"the {site_of(name, replace).kind} that is spliced in at {name}"
    if not known.is_at(name):
        yield f"{what} was trained at {known.hookpoint}"
    own = model.name_or_path
    if not known.is_of(own, type(model).__name__):
        yield f"{what} was trained on {known.model}, and this model is {own}"


def _function(name: str, replace: Sae | Replace | Predict) -> Replace | Predict:
    if isinstance(replace, Predict):
        return replace
    if isinstance(replace, Sae):
        return _reconstruction(site_of(name, replace), replace)
    if not callable(replace):
        raise ValueError(f"{name}: a {type(replace).__name__} cannot replace activations: give an Sae or a function")
    return replace


def _reconstruction(site: Site, sae: Sae) -> Replace | Predict:
    name, kind = site.name, site.kind
    if site.of_two_models:
        raise ValueError(
            f"{name}: a crosscoder of two models reads both, so it cannot be spliced into one: `saekit eval` and "
            "`saekit.evaluate` run both, or read them with saekit.tap and splice in each one's part of sae(x).recon as "
            "a function"
        )
    if kind == "crosscoder":
        raise ValueError(
            f"{name}: a crosscoder reads later layers than it writes, so one forward pass cannot replace them: "
            "`saekit eval` and `saekit.evaluate` do it in two, reading first, or read with saekit.tap and splice in "
            "each hookpoint's part of sae(x).recon as a function"
        )

    def reconstruct(acts: Tensor, target: Tensor | None = None) -> Tensor:
        for given, width in ((acts, sae.d_in), (acts if target is None else target, sae.d_out)):
            if given.shape[-1] != width:
                raise ValueError(
                    f"{name}: the {kind} is for a width of {width}, and the activations are {described(given)}"
                )
        return sae.reconstruct(acts, target)

    return Predict(tuple(each.name for each in site.reads), reconstruct) if site.transcodes else reconstruct


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
