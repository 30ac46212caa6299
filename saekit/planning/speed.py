"""Computes the time of an optimizer step: each kind of work divided by its measured rate."""

from __future__ import annotations

from dataclasses import dataclass

from saekit.planning.rates import Rates

MUON_WIDTH = 512
"""The width at which Muon's update is timed. The time of its matmuls per parameter is proportional to the width."""
DENSE_PASSES = {"eager": 3}
"""Matmuls of the encoder's size in the forward and backward pass, if not 1: plain autograd makes dense gradients."""


@dataclass(frozen=True)
class StepWork:
    """The work of the busiest rank in an optimizer step."""

    tokens: int
    """Tokens per rank and micro-batch that the language model reads (N)."""
    micro_batches: int
    """`--grad-acc-steps`."""
    chunks: int
    """`--micro-acc-steps`."""
    trained: int
    """Tokens per micro-batch that each layer of the rank trains on: the rank's own, or those of all ranks."""
    layers: int
    """SAEs of one size that the rank trains."""
    d_in: int
    """D."""
    num_latents: int
    """M."""
    k: int
    """K summed over the codes of a token, including Multi-TopK's."""
    lm_operations: float
    """Operations of the language model per token."""
    lm_blocks: int
    """Blocks of the language model."""
    lm_width: int
    """The width of the residual stream."""
    lm_type: str
    """The language model's type, as in `Rates.matmul`."""
    kernels: str
    """The name of the kernels."""
    select_type: str
    """The type in which candidates are selected."""
    optimizer: str
    """The key of the optimizer, see `rates.optimizer_key`."""
    params_held: int
    """Parameters per layer that the rank's optimizer steps."""
    sent: int
    """Bytes that the rank sends to other ranks."""
    ranks: int
    """The number of ranks."""
    sharing: int
    """The number of ranks that share a device: all of them on a CPU, 1 on GPUs."""
    whole_layers_travel: bool
    """Whether each layer's activations travel to one rank. If not, ranks sum and gather tensors that all need."""
    d_out: int | None = None
    """D_out of transcoders; None if it equals D."""

    @property
    def mean_width(self) -> float:
        """Return the mean width of encoder and decoder, for work that both do."""
        return (self.d_in + (self.d_in if self.d_out is None else self.d_out)) / 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, part by part, without overlap. Runs overlap parts and can be faster."""

    language_model: float
    passes: float
    """The forward and backward passes of the SAEs."""
    update: float
    """The optimizers' steps."""
    network: float
    """The traffic between ranks."""

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        return self.language_model + self.passes + self.update + self.network


def step_time(work: StepWork, rates: Rates) -> StepTime | None:
    """Return the time of a step; None if a rate that it needs was not measured.

    It assumes no dead latents, so AuxK costs nothing.
    """
    kernels = f"{work.kernels} {work.select_type}"
    measured = (
        work.lm_type in rates.matmul
        and work.lm_type in rates.block
        and work.select_type in rates.matmul
        and kernels in rates.passes
        and work.optimizer in rates.update
        and (work.ranks == 1 or work.ranks in rates.network)
    )
    if not measured:
        return None

    read = work.micro_batches * work.tokens
    language_model = read * (
        work.lm_operations / rates.matmul[work.lm_type] + work.lm_blocks * work.lm_width * rates.block[work.lm_type]
    )
    passes = work.layers * work.micro_batches * pass_seconds(work, rates)
    # Muon's matmuls take operations per parameter in proportion to the width.
    width = work.d_in / MUON_WIDTH if work.optimizer == "muon" else 1
    update = work.layers * work.params_held * rates.update[work.optimizer] * width
    network = 0.0
    if work.ranks > 1:
        measured_network = rates.network[work.ranks]
        rate = measured_network.point_to_point if work.whole_layers_travel else measured_network.all_reduce
        network = work.sent / rate
    return StepTime(language_model * work.sharing, passes * work.sharing, update * work.sharing, network)


def pass_seconds(work: StepWork, rates: Rates) -> float:
    """Return the seconds of one layer's forward and backward passes over a micro-batch."""
    cost = rates.passes[f"{work.kernels} {work.select_type}"]
    scores, weights = work.trained * work.num_latents, work.num_latents * work.mean_width
    dense = 2 * scores * work.d_in * DENSE_PASSES.get(work.kernels, 1)
    # The first chunk of a step makes the gradients of both matrices. Each further chunk makes its own and adds them,
    # which reads two tensors and writes one.
    chunks = work.chunks
    further = (chunks - 1 / work.micro_batches) * 2 * weights * 3 * 4 / rates.bandwidth
    return (
        dense / rates.matmul[work.select_type]
        + scores * cost.score
        + work.trained * work.k * work.mean_width * cost.term
        + chunks * (weights * cost.weight + cost.call)
        + further
    )
