"""Sites: where a coder stands in the language model, what it reads and what it writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.activations.hookpoints import OTHER, Hookpoint
from saekit.sae import Sae
from saekit.sae.storage import IN

CROSSCODER = "crosscoder"
"""The name of the only crosscoder of a run, and of its folder."""


@dataclass(frozen=True)
class Site:
    """What one coder reads and writes.

    An autoencoder reads and writes the same hookpoint, a crosscoder the same several; a transcoder reads one and writes
    another. What travels to a coder is one tensor with a row per token: what it reads, and behind that what it writes,
    if that is something else.
    """

    name: str
    """Of the coder and its folder: the hookpoint that it writes, in two models or one, or `CROSSCODER`."""
    reads: tuple[Hookpoint, ...]
    writes: tuple[Hookpoint, ...]

    @property
    def transcodes(self) -> bool:
        """Tell whether it writes something else than it reads."""
        return self.reads != self.writes

    @property
    def kind(self) -> str:
        """Return what its coder is called: SAE, transcoder or crosscoder."""
        return "transcoder" if self.transcodes else "crosscoder" if len(self.reads) > 1 else "SAE"

    @property
    def of_two_models(self) -> bool:
        """Tell whether it is a crosscoder of the same hookpoint in two models."""
        return any(each.name.startswith(OTHER) for each in self.parts)

    @property
    def parts(self) -> tuple[Hookpoint, ...]:
        """Return the hookpoints whose activations travel to it, in the order of their columns."""
        return (*self.reads, *self.writes) if self.transcodes else self.reads

    @property
    def d_in(self) -> int:
        """D_in, numbers per token that it reads."""
        return sum(each.width for each in self.reads)

    @property
    def d_out(self) -> int:
        """D_out, numbers per token that it writes."""
        return sum(each.width for each in self.writes)

    @property
    def width(self) -> int:
        """Return the numbers per token that travel to it."""
        return sum(each.width for each in self.parts)

    @property
    def layer(self) -> int | None:
        """Return the number of the block that it writes to; None outside the blocks, and of several."""
        numbers = {each.layer for each in self.writes}
        return numbers.pop() if len(numbers) == 1 else None

    def seed(self, init_seed: int) -> int:
        """Return the seed of a coder's initial weights, which does not depend on the other units."""
        return (self.writes[0] if len(self.writes) == 1 else Hookpoint(self.name, 0)).seed(init_seed)


def autoencoder(hookpoint: Hookpoint) -> Site:
    """Return the site of an SAE."""
    return Site(hookpoint.name, (hookpoint,), (hookpoint,))


def transcoder(read: Hookpoint, written: Hookpoint) -> Site:
    """Return the site of a transcoder."""
    return Site(written.name, (read,), (written,))


def crosscoder(hookpoints: Sequence[Hookpoint]) -> Site:
    """Return the site of a crosscoder; of a single hookpoint it is an SAE, and named like one."""
    name = hookpoints[0].name if len(hookpoints) == 1 else CROSSCODER
    return Site(name, tuple(hookpoints), tuple(hookpoints))


def across_models(hookpoint: Hookpoint, other_width: int) -> Site:
    """Return the site of a crosscoder of a hookpoint and of the same one in a second model; named after it."""
    both = (hookpoint, Hookpoint(OTHER + hookpoint.name, other_width))
    return Site(hookpoint.name, both, both)


def site_of(name: str, sae: Sae) -> Site:
    """Return where a finished coder stands, see `site_at`; only its sizes are looked at."""
    return site_at(name, sae.d_in, sae.d_out if sae.transcode else None, sae.reads, sae.writes)


def site_at(name: str, d_in: int, d_out: int | None, reads: Mapping[str, int], writes: Mapping[str, int]) -> Site:
    """Return where a finished coder stands: what it reads and writes, by its files and the name that it goes by.

    An SAE stands where its name says, and so does a transcoder whose files say nothing (sparsify's) or that reads the
    input of the module that it writes. What is behind a `/` in a name (sparsify's `layers.3/seed1`) is no part of it.

    Args:
        name: The hookpoint that it writes, or `CROSSCODER`.
        d_in: D.
        d_out: D_out of a transcoder, else None.
        reads: See `Sae`.
        writes: See `Sae`.

    Raises:
        ValueError: If the name of a transcoder is that of a module's input, and nothing says what it reads.
    """
    place = name.partition("/")[0]
    read, written = named(reads), named(writes)
    if d_out is None:
        here = (Hookpoint(place, d_in),)
        return Site(name, read, read) if len(read) > 1 else Site(name, here, here)
    if len(written) == 1:
        own_input = [each.name for each in read] == [f"{written[0].name}{IN}"]
        if written[0].name == place or not own_input:
            return Site(name, read, (Hookpoint(place, d_out),))
    if place.endswith(IN):
        raise ValueError(
            f"{name}: a transcoder predicts a module's output, and its files do not say that this one writes an input: "
            f"name the module, {place.removesuffix(IN)}"
        )
    return Site(name, (Hookpoint(f"{place}{IN}", d_in),), (Hookpoint(place, d_out),))


def common(kinds: Iterable[str]) -> str:
    """Return what coders of these kinds are called together: SAE, transcoder or crosscoder; coder if they differ."""
    different = set(kinds)
    return different.pop() if len(different) == 1 else "coder"


def hookpoints_of(sites: Iterable[Site]) -> tuple[Hookpoint, ...]:
    """Return the hookpoints that sites need, each once."""
    return tuple(dict.fromkeys(part for site in sites for part in site.parts))


def join(of: dict[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return what travels to each site, `[N, width]` by its name.

    Args:
        of: `[N, D]` by hookpoint; emptied, so that memory is free as soon as it can be.
        sites: In model order.
    """
    needed = [part.name for site in sites for part in site.parts]
    joined: dict[str, Tensor] = {}
    for site in sites:
        tensors = []
        for part in site.parts:
            needed.remove(part.name)
            tensors.append(of[part.name] if part.name in needed else of.pop(part.name))
        joined[site.name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)
        del tensors
    return joined


def widths_of(hookpoints: Iterable[Hookpoint]) -> dict[str, int]:
    """Return D by hookpoint's name."""
    return {each.name: each.width for each in hookpoints}


def named(widths: Mapping[str, int]) -> tuple[Hookpoint, ...]:
    """Return the hookpoints of these names and widths; the inverse of `widths_of`."""
    return tuple(Hookpoint(name, width) for name, width in widths.items())
