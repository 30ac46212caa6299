"""Read two language models over the same tokens (`--crosscode-models`), at the hookpoints that both have.

A hookpoint of the second model has the prefix `OTHER`: `other.layers.3`. Functions that take `Models` accept both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from saekit.activations.hookpoints import OTHER, Hookpoint
from saekit.activations.sites import Site, across_models
from saekit.activations.structure import Reading
from saekit.activations.tap import tap
from saekit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Models = Mapping[str, "PreTrainedModel"]
"""Models by the prefix of their hookpoints' names: "" for the first, and `OTHER` for a second."""


def models_of(model: PreTrainedModel, other: PreTrainedModel | None) -> Models:
    """Return one or two models by their prefixes."""
    return {"": model} if other is None else {"": model, OTHER: other}


def names_in(prefix: str, hookpoints: Iterable[str]) -> list[str]:
    """Return the hookpoints that belong to one model, without its prefix.

    Args:
        prefix: A key of `Models`.
        hookpoints: Names of hookpoints of both models.
    """
    own = (name for name in hookpoints if name.startswith(OTHER) == (prefix == OTHER))
    return [name.removeprefix(prefix) for name in own]


def paired(hookpoints: Sequence[Hookpoint], readings: Mapping[str, Reading], name: str) -> tuple[Site, ...]:
    """Return the sites of crosscoders, each of which reads and writes one hookpoint in two models.

    Args:
        hookpoints: Hookpoints of the first model.
        readings: The second model's readings, by hookpoint.
        name: The second model's name.

    Raises:
        UserError: If the second model has no such hookpoint, or if it cannot be read there.
    """
    sites = []
    for each in hookpoints:
        found = readings.get(each.name)
        if found is None:
            blocks = [other for other in readings if Hookpoint(other, 0).is_block]
            raise UserError(
                f"--crosscode-models {name}: it has no {each.name}, its layers are {blocks[0]} to {blocks[-1]}. Choose "
                "hookpoints that both models have with --hookpoints or --layers"
            )
        if found.width is None:
            raise UserError(f"--crosscode-models {name}: {each.name} cannot be read: {each.module} {found.reason}")
        sites.append(across_models(each, found.width))
    return tuple(sites)


def _as_it_is(acts: Tensor) -> Tensor:
    return acts


@contextmanager
def tap_all(models: Models, hookpoints: Sequence[str]) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Hook modules of one or two models. See `tap`.

    Yields:
        A function that runs the models on `input_ids` one after the other, each up to its last hookpoint. It returns
        each hookpoint's activations `[B, T, D]`, on the device of `input_ids`. With `keep=`, it returns the result of
        this function for each, and frees the activations before the next model runs.
    """
    with ExitStack() as opened:
        own = {prefix: names_in(prefix, hookpoints) for prefix in models}
        reads = {prefix: opened.enter_context(tap(models[prefix], names)) for prefix, names in own.items() if names}

        def run(input_ids: Tensor, keep: Callable[[Tensor], Tensor] = _as_it_is) -> dict[str, Tensor]:
            of: dict[str, Tensor] = {}
            for prefix, read in reads.items():
                raw = read(input_ids)
                # `pop` frees them one by one.
                of |= {f"{prefix}{name}": keep(raw.pop(name).to(input_ids.device)) for name in list(raw)}
            return of

        yield run
