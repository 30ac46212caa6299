"""Two language models over the same tokens (`--crosscode-models`): their common hookpoints, and reading both.

A hookpoint of the second is named like a path below `OTHER`: `other.layers.3`. Whatever takes hookpoints takes those,
too, with `Models` in place of a model.
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
"""By what begins the names of their hookpoints: "" the first, `OTHER` the second, where there are two."""


def models_of(model: PreTrainedModel, other: PreTrainedModel | None) -> Models:
    """Return one model or two."""
    return {"": model} if other is None else {"": model, OTHER: other}


def names_in(prefix: str, hookpoints: Iterable[str]) -> list[str]:
    """Return those hookpoints that belong to one of the models, by their names in it.

    Args:
        prefix: A key of `Models`.
        hookpoints: Of both models.
    """
    own = (name for name in hookpoints if name.startswith(OTHER) == (prefix == OTHER))
    return [name.removeprefix(prefix) for name in own]


def paired(hookpoints: Sequence[Hookpoint], readings: Mapping[str, Reading], name: str) -> tuple[Site, ...]:
    """Return the sites of crosscoders that read and write hookpoints in two models.

    Args:
        hookpoints: Of the first model.
        readings: What there is in the second, by hookpoint.
        name: The second model's.

    Raises:
        UserError: If the second has no such hookpoint, or it cannot be read there.
    """
    sites = []
    for each in hookpoints:
        found = readings.get(each.name)
        if found is None:
            blocks = [other for other in readings if Hookpoint(other, 0).is_block]
            raise UserError(
                f"--crosscode-models {name}: it has no {each.name}, its layers are {blocks[0]} to {blocks[-1]}; name "
                "what both models have with --hookpoints or --layers"
            )
        if found.width is None:
            raise UserError(f"--crosscode-models {name}: {each.name} cannot be read: {each.module} {found.reason}")
        sites.append(across_models(each, found.width))
    return tuple(sites)


def _as_it_is(acts: Tensor) -> Tensor:
    return acts


@contextmanager
def tap_all(models: Models, hookpoints: Sequence[str]) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Hook modules of one model or of two; see `tap`.

    Yields:
        A function that runs them on `input_ids` one after the other, each up to its last hookpoint, and returns each
        hookpoint's activations `[B, T, D]`, all on the device of `input_ids`; or, with `keep=`, what that makes of
        them: the activations themselves are then dropped, before the next model runs.
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
