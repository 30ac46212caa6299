"""The quantities that a placement's traffic and memory depend on. Each placement has its own formulas.

`benchmarks/placement.py` compares the formulas with the bytes that the kernel counts on sockets and with the tensors
that ranks hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

Backend = Literal["gloo", "nccl"]

Costs = Mapping[str, float]
"""The relative cost of a step of each unit, by hookpoint in model order. Units of equal size have equal costs."""

FLOAT32 = 4
"""Bytes of a parameter, of a gradient, and of a latent's fired count (int32)."""
ADAM = 8
"""Bytes of optimizer state per parameter: two float32 moments."""


class Size(NamedTuple):
    """The size of a coder and of the activations that travel to it."""

    num_latents: int
    """M."""
    d_in: int
    """D, the width that it reads."""
    d_out: int
    """D_out, the width that it writes. For an SAE it equals D."""
    transcodes: bool = False
    """Whether it is a transcoder, whose targets travel in addition to its inputs."""
    joins: bool = False
    """Whether it is a crosscoder, an autoencoder of several hookpoints."""

    @property
    def width(self) -> int:
        """Return the numbers per token that travel to the coder."""
        return self.d_in + self.d_out if self.transcodes else self.d_in

    def text(self) -> str:
        """Return the size in words, for messages."""
        to = " of several hookpoints" if self.joins else ""
        to = f", to be transcoded to width {self.d_out}" if self.transcodes else to
        return f"{self.num_latents} latents for width {self.d_in}{to}"

    def params(self, skip: bool = False) -> int:
        """Return the number of parameters: two matrices, two biases, and a transcoder's skip connection with `skip`."""
        both = self.num_latents * (self.d_in + self.d_out) + self.num_latents + self.d_out
        return both + (self.d_in * self.d_out if skip and self.transcodes else 0)


@dataclass(frozen=True)
class Workload:
    """The quantities that traffic and memory of one optimizer step depend on."""

    layers: int
    """Coders in training (L)."""
    size: Size
    """The size of each coder."""
    world_size: int
    """Ranks (W)."""
    tokens: int
    """Counted tokens per rank and optimizer step, before activations are routed (N)."""
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
        """Return the parameters of one coder."""
        return self.size.params(self.skip)

    def all_gather(self, size: float) -> float:
        """Return the bytes that each rank sends (and receives) in an all-gather of `size` bytes: all parts but one."""
        return size * (self.world_size - 1) / self.world_size

    def all_reduce(self, size: float) -> float:
        """Return the same for an all-reduce of `size` bytes around a ring: a reduce-scatter, then an all-gather."""
        return 2 * self.all_gather(size)

    def reduce_scatter(self, size: float) -> float:
        """Return the same for a reduce-scatter of `size` bytes. Torch's gloo runs a whole all-reduce for it."""
        return self.all_reduce(size) if self.backend == "gloo" else self.all_gather(size)


@dataclass(frozen=True)
class Traffic:
    """Payload that one rank exchanges with all others in one optimizer step, in bytes."""

    sent: int
    received: int


NO_TRAFFIC = Traffic(0, 0)
