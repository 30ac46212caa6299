"""Which rank trains which layer, and what each placement costs a rank in traffic and in memory. Pure arithmetic.

`benchmarks/placement.py` holds the formulae to what the kernel counts on the sockets and to the tensors that are held.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from saekit.errors import UserError

PlacementName = Literal["ddp", "zero3", "layer-map"]
Backend = Literal["gloo", "nccl"]

FLOAT32 = 4
"""Bytes of a parameter, a gradient, and a latent's fired count (int32)."""
ADAM = 8
"""Bytes of optimiser state per parameter: two float32 moments."""


def balanced_map(hookpoints: Sequence[str], world_size: int, cost: Mapping[str, float] | None = None) -> dict[str, int]:
    """Owner rank of every hookpoint, such that the busiest rank has little to do.

    Equal costs give contiguous blocks whose sizes differ by at most one, the larger first. Otherwise the most
    expensive layer goes first to the rank with the least so far (Graham 1969: at most 4/3 of the optimum).

    Args:
        hookpoints: In the order of the layers.
        world_size: Ranks; those beyond the number of layers get none.
        cost: Relative cost of each hookpoint; equal where not given.
    """
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}: there is at least one rank")
    if cost is None or len({cost[name] for name in hookpoints}) < 2:
        size, longer = divmod(len(hookpoints), world_size)
        owners = [rank for rank in range(world_size) for _ in range(size + (rank < longer))]
        return dict(zip(hookpoints, owners, strict=True))
    load = [0.0] * world_size
    owner = {}
    for name in sorted(hookpoints, key=lambda each: -cost[each]):  # stable: equal ones stay in the order of layers
        rank = load.index(min(load))
        owner[name] = rank
        load[rank] += cost[name]
    return {name: owner[name] for name in hookpoints}


def parse_map(text: str) -> dict[int, int]:
    """`"0-5:0,6-11:1"` → rank by layer number; ranges include their end.

    Raises:
        UserError: If the text is not of that form, or names a layer twice.
    """
    owner: dict[int, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?:([0-9]{1,5})\s*", part)
        if found is None:
            raise UserError(f"--layer-map {text!r}: {part!r} should be layers and their rank, as in 0-5:0,6-11:1")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise UserError(f"--layer-map {text!r}: the range of {part.strip()!r} is empty; write {last}-{first}")
        for layer in range(first, last + 1):
            if layer in owner:
                raise UserError(f"--layer-map {text!r}: layer {layer} is there twice")
            owner[layer] = int(found[3])
    return owner


def resolve_map(text: str | None, layers: Sequence[int], hookpoints: Sequence[str], world_size: int) -> dict[str, int]:
    """Owner rank of every hookpoint: as `--layer-map` says, or balanced where it says nothing.

    Args:
        text: What `--layer-map` was given.
        layers: Numbers of the layers that are trained.
        hookpoints: Their names, in the same order.
        world_size: Number of ranks.

    Raises:
        UserError: If the text cannot be read or does not fit the layers or the ranks.
    """
    if text is None:
        return balanced_map(hookpoints, world_size)
    owner = parse_map(text)
    if missing := sorted(set(layers) - set(owner)):
        raise UserError(f"--layer-map {text!r} gives no rank for {_layers(missing)}: every trained layer needs one")
    if surplus := sorted(set(owner) - set(layers)):
        raise UserError(f"--layer-map {text!r} names {_layers(surplus)}, not trained here: see --layers")
    if (highest := max(owner.values())) >= world_size:
        raise UserError(
            f"--layer-map {text!r}: there is no rank {highest}; the last of {world_size} is {world_size - 1}"
        )
    return {name: owner[layer] for layer, name in zip(layers, hookpoints, strict=True)}


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


@dataclass(frozen=True)
class Workload:
    """What the traffic and the memory of one optimiser step depend on."""

    layers: int
    """SAEs that are trained (L)."""
    d_in: int
    """Model width (D)."""
    num_latents: int
    """Latents per SAE (M)."""
    world_size: int
    """Ranks (W)."""
    tokens: int
    """Tokens per rank and optimiser step that train the SAEs, before layers are routed (N)."""
    micro_batches: int = 1
    """Forward passes of the language model per optimiser step (`--grad-acc-steps`)."""
    chunks: int = 1
    """Parts of a micro-batch, each with its own backward pass (`--micro-acc-steps`)."""
    act_bytes: int = 2
    """Bytes per activation element, in the language model's type (s)."""
    backend: Backend = "nccl"

    @property
    def params(self) -> int:
        """Parameters of one SAE: encoder and decoder, and their biases."""
        return 2 * self.num_latents * self.d_in + self.num_latents + self.d_in

    def all_gather(self, size: float) -> float:
        """Bytes each rank sends, and as many receives, when all get a whole of `size` bytes: all parts but one."""
        return size * (self.world_size - 1) / self.world_size

    def all_reduce(self, size: float) -> float:
        """The same for a sum of `size` bytes that all get, around a ring: a reduce-scatter, then an all-gather."""
        return 2 * self.all_gather(size)

    def reduce_scatter(self, size: float) -> float:
        """The same where each rank gets its part of the sum only. Torch's gloo runs a whole all-reduce for it."""
        return self.all_reduce(size) if self.backend == "gloo" else self.all_gather(size)


@dataclass(frozen=True)
class Traffic:
    """What one rank exchanges with all others in one optimiser step, in bytes of payload."""

    sent: int
    received: int


def traffic(placement: PlacementName, load: Workload, owned: int = 0) -> Traffic:
    """Bytes that one rank sends and receives per optimiser step.

    - ddp: gradients, 4·P·L bytes, are all-reduced once, and so are the fired counts, int32 `[L, M]`.
    - zero3: every chunk gathers each layer's parameters before its forward and again before its backward pass, and
      reduce-scatters its gradients. Decoder rows are whole within a shard if W divides M; if not, the dot products
      with the gradient, and the norms before and after the step are all-reduced, float32 `[3, M]` per layer. Fired
      counts as under ddp.
    - layer-map: a rank sends its N·D activations of every layer that others own, and receives those of the other
      W - 1 ranks for each of its own. An owner sees every token, so nothing needs to be counted together.

    What is left out does not grow with the SAEs: token counts, numbers of tokens to come, statistics at each report.

    Args:
        placement: As in `--placement`.
        load: The step; its tokens are taken as the same on every rank.
        owned: Layers that this rank owns; for layer-map only.
    """
    if placement == "layer-map":
        activations = load.tokens * load.d_in * load.act_bytes
        return Traffic((load.layers - owned) * activations, (load.world_size - 1) * owned * activations)
    vector = FLOAT32 * load.num_latents
    weights = FLOAT32 * load.params
    each_layer = load.all_reduce(vector)
    if placement == "ddp":
        each_layer += load.all_reduce(weights)
    else:
        passes = load.micro_batches * load.chunks
        each_layer += passes * (2 * load.all_gather(weights) + load.reduce_scatter(weights))
        if load.num_latents % load.world_size:
            each_layer += 3 * load.all_reduce(vector)
    total = round(load.layers * each_layer)
    return Traffic(total, total)


def memory(placement: PlacementName, load: Workload, owned: int = 0, state: int = ADAM) -> int:
    """Bytes of parameters, gradients and optimiser state that one rank holds when the optimiser steps.

    - ddp: 4 + 4 + `state` per parameter of every layer.
    - zero3: the same divided by W. The layer at work is gathered for a while, too.
    - layer-map: as ddp, for the layers that the rank owns; less where gradients are left to the step.

    Args:
        placement: As in `--placement`.
        load: The run.
        owned: Layers that this rank owns; for layer-map only.
        state: Bytes of optimiser state per parameter.
    """
    each = 2 * FLOAT32 + state
    if placement == "zero3":
        return round(each * load.params * load.layers / load.world_size)
    return each * load.params * (owned if placement == "layer-map" else load.layers)
