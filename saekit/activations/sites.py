"""Sites: what a coder reads and writes in the language model."""

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

    An autoencoder reads and writes the same hookpoint, and a crosscoder the same several hookpoints. A transcoder reads
    one hookpoint and writes another. A coder gets one tensor with a row per token: what it reads, followed by what it
    writes if that differs.
    """

    name: str
    """The name of the coder and its folder: the hookpoint that it writes, in one model or two, or `CROSSCODER`."""
    reads: tuple[Hookpoint, ...]
    writes: tuple[Hookpoint, ...]

    @property
    def transcodes(self) -> bool:
        """Return whether it writes other hookpoints than it reads."""
        return self.reads != self.writes

    @property
    def kind(self) -> str:
        """Return the kind of coder: SAE, transcoder or crosscoder."""
        return "transcoder" if self.transcodes else "crosscoder" if len(self.reads) > 1 else "SAE"

    @property
    def of_two_models(self) -> bool:
        """Return whether it is a crosscoder of the same hookpoint in two models."""
        return any(each.name.startswith(OTHER) for each in self.parts)

    @property
    def parts(self) -> tuple[Hookpoint, ...]:
        """Return the hookpoints whose activations it gets, in the order of their columns."""
        return (*self.reads, *self.writes) if self.transcodes else self.reads

    @property
    def d_in(self) -> int:
        """Return D_in, the numbers per token that it reads."""
        return sum(each.width for each in self.reads)

    @property
    def d_out(self) -> int:
        """Return D_out, the numbers per token that it writes."""
        return sum(each.width for each in self.writes)

    @property
    def width(self) -> int:
        """Return the numbers per token that it gets."""
        return sum(each.width for each in self.parts)

    @property
    def layer(self) -> int | None:
        """Return the number of the block that it writes to. None outside the blocks or for several blocks."""
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
    """Return the site of a crosscoder. With a single hookpoint this is the site of an SAE."""
    name = hookpoints[0].name if len(hookpoints) == 1 else CROSSCODER
    return Site(name, tuple(hookpoints), tuple(hookpoints))


def across_models(hookpoint: Hookpoint, other_width: int) -> Site:
    """Return the site of a crosscoder of one hookpoint in two models, named after the hookpoint."""
    both = (hookpoint, Hookpoint(OTHER + hookpoint.name, other_width))
    return Site(hookpoint.name, both, both)


def site_of(name: str, sae: Sae) -> Site:
    """Return the site of a finished coder, from its sizes and its name. See `site_at`."""
    return site_at(name, sae.d_in, sae.d_out if sae.transcode else None, sae.reads, sae.writes)


def site_at(name: str, d_in: int, d_out: int | None, reads: Mapping[str, int], writes: Mapping[str, int]) -> Site:
    """Return the site of a finished coder, from its files and its name.

    The name gives the hookpoint of an SAE. It also gives that of a transcoder if its files do not name hookpoints (as
    sparsify's) or if it reads the input of the module that it writes. A suffix after `/`, as in sparsify's
    `layers.3/seed1`, is ignored.

    Args:
        name: The hookpoint that it writes, or `CROSSCODER`.
        d_in: D.
        d_out: D_out for a transcoder, otherwise None.
        reads: See `Sae`.
        writes: See `Sae`.

    Raises:
        ValueError: If a transcoder's name is a module's input, and its files do not say what it reads.
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
            f"{name}: a transcoder predicts a module's output, unless its files say that it writes an input. Name the "
            f"module, {place.removesuffix(IN)}"
        )
    return Site(name, (Hookpoint(f"{place}{IN}", d_in),), (Hookpoint(place, d_out),))


def common(kinds: Iterable[str]) -> str:
    """Return the common kind of several coders: SAE, transcoder or crosscoder, or coder if they differ."""
    different = set(kinds)
    return different.pop() if len(different) == 1 else "coder"


def hookpoints_of(sites: Iterable[Site]) -> tuple[Hookpoint, ...]:
    """Return the hookpoints that sites need, without repeats."""
    return tuple(dict.fromkeys(part for site in sites for part in site.parts))


def join(of: dict[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Join the activations that each site gets, `[N, width]` by the site's name.

    Args:
        of: `[N, D]` by hookpoint. Emptied, so that memory is freed as early as possible.
        sites: The sites, in model order.
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
    """Return the width of each hookpoint, by name."""
    return {each.name: each.width for each in hookpoints}


def named(widths: Mapping[str, int]) -> tuple[Hookpoint, ...]:
    """Return the hookpoints of these names and widths, the inverse of `widths_of`."""
    return tuple(Hookpoint(name, width) for name, width in widths.items())
