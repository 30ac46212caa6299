"""The quantities that a placement's traffic and memory depend on; each placement has its own formulas.

`benchmarks/placement.py` compares the formulas with what the kernel counts on the sockets and with the tensors held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Backend = Literal["gloo", "nccl"]

Costs = Mapping[str, float]
"""What a step of each unit costs, relative to the others, by hookpoint in model order: the same number if all are of
one size."""

FLOAT32 = 4
"""Bytes of a parameter, a gradient, and a latent's fired count (int32)."""
ADAM = 8
"""Bytes of optimizer state per parameter: two float32 moments."""


class Size(NamedTuple):
    """The size of a coder, and of what travels to it."""

    num_latents: int
    """M."""
    d_in: int
    """D, numbers per token that it reads."""
    d_out: int
    """D_out, numbers per token that it writes; for an SAE the same."""
    transcodes: bool = False
    """Whether what it writes is something else than what it reads, and so travels as well."""
    joins: bool = False
    """Whether it is an autoencoder of several hookpoints, a crosscoder."""

    @property
    def width(self) -> int:
        """Return the numbers per token that travel to it."""
        return self.d_in + self.d_out if self.transcodes else self.d_in

    def text(self) -> str:
        """Return it in words, for messages."""
        to = " of several hookpoints" if self.joins else ""
        to = f", to be transcoded to width {self.d_out}" if self.transcodes else to
        return f"{self.num_latents} latents for width {self.d_in}{to}"

    def params(self, skip: bool = False) -> int:
        """Return the parameters: two matrices, their biases, and a transcoder's skip connection if it has one."""
        both = self.num_latents * (self.d_in + self.d_out) + self.num_latents + self.d_out
        return both + (self.d_in * self.d_out if skip and self.transcodes else 0)


@dataclass(frozen=True)
class Workload:
    """The quantities that traffic and memory of one optimizer step depend on."""

    layers: int
    """Coders that are trained (L)."""
    size: Size
    """Of each of them."""
    world_size: int
    """Ranks (W)."""
    tokens: int
    """Tokens per rank and optimizer step that train the SAEs, before activations are routed (N)."""
    micro_batches: int = 1
    """Forward passes of the language model per optimizer step (`--grad-acc-steps`)."""
    chunks: int = 1
    """Parts of a micro-batch, each with its own backward pass (`--micro-acc-steps`)."""
    act_bytes: int = 2
    """Bytes per activation element, in the language model's type (s)."""
    backend: Backend = "nccl"
    skip: bool = False
    """Whether transcoders have a skip connection."""

    @property
    def params(self) -> int:
        """Parameters of one coder."""
        return self.size.params(self.skip)

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
    """Bytes of payload that one rank exchanges with all others in one optimizer step."""

    sent: int
    received: int


NO_TRAFFIC = Traffic(0, 0)
