"""The time of an optimizer step: each kind of work divided by the rate that was measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from saekit.planning.rates import Rates

MUON_WIDTH = 512
"""At which Muon's update was timed; its matmuls take time in proportion to the width."""
DENSE_PASSES = {"eager": 3}
"""Matmuls of the encoder's size in forward and backward pass: plain autograd makes both gradients densely."""


@dataclass(frozen=True)
class StepWork:
    """The work of the busiest rank in an optimizer step."""

    tokens: int
    """Per rank and micro-batch, those that the language model reads (N)."""
    micro_batches: int
    """`--grad-acc-steps`."""
    chunks: int
    """`--micro-acc-steps`."""
    trained: int
    """Tokens per micro-batch that each of its layers trains on: its own, or all ranks'."""
    layers: int
    """SAEs of one size that it trains."""
    d_in: int
    num_latents: int
    k: int
    """Active latents per token; Multi-TopK's 4k included."""
    lm_operations: float
    """Of the language model, per token."""
    lm_blocks: int
    lm_width: int
    """Of the residual stream."""
    lm_type: str
    """As in `Rates.matmul`."""
    kernels: str
    select_type: str
    optimizer: str
    """As `rates.optimizer_key` says."""
    params_held: int
    """Per layer and rank: the parameters that its optimizer steps."""
    sent: int
    """Bytes to other ranks."""
    ranks: int
    sharing: int
    """Ranks among which a device's rate is shared out: all of them on a CPU, whose cores they share."""
    whole_layers_travel: bool
    """Whether each layer's activations go to one rank; else ranks sum and gather what all of them need."""
    d_out: int | None = None
    """Of transcoders; None where it is `d_in`."""

    @property
    def mean_width(self) -> float:
        """Return the mean width of encoder and decoder, for work that is done in both."""
        return (self.d_in + (self.d_in if self.d_out is None else self.d_out)) / 2


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, one part after the other: what overlaps in fact makes a run faster than this."""

    language_model: float
    passes: float
    """Forward and backward passes of the SAEs."""
    update: float
    network: float

    @property
    def total(self) -> float:
        """Return the total."""
        return self.language_model + self.passes + self.update + self.network


def step_time(work: StepWork, rates: Rates) -> StepTime | None:
    """Return the time of a step; None where something that it needs was not measured.

    No latent is taken for dead: AuxK costs nothing until some are.
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
    alone = work.sharing  # seconds of the work are multiplied by it
    read = work.micro_batches * work.tokens
    language_model = read * (
        work.lm_operations / rates.matmul[work.lm_type] + work.lm_blocks * work.lm_width * rates.block[work.lm_type]
    )
    passes = work.layers * work.micro_batches * pass_seconds(work, rates)
    # Muon multiplies matrices, whose operations per parameter grow with their width.
    width = work.d_in / MUON_WIDTH if work.optimizer == "muon" else 1
    update = work.layers * work.params_held * rates.update[work.optimizer] * width
    network = 0.0
    if work.ranks > 1:
        measured_network = rates.network[work.ranks]
        rate = measured_network.point_to_point if work.whole_layers_travel else measured_network.all_reduce
        network = work.sent / rate
    return StepTime(language_model * alone, passes * alone, update * alone, network)


def pass_seconds(work: StepWork, rates: Rates) -> float:
    """Return the seconds of one layer's forward and backward passes over a micro-batch."""
    cost = rates.passes[f"{work.kernels} {work.select_type}"]
    scores, weights = work.trained * work.num_latents, work.num_latents * work.mean_width
    dense = 2 * scores * work.d_in * DENSE_PASSES.get(work.kernels, 1)
    # The first chunk makes the gradients of both matrices; each further one, in a step, makes its own and adds them:
    # two read, one written.
    chunks = work.chunks
    further = (chunks - 1 / work.micro_batches) * 2 * weights * 3 * 4 / rates.bandwidth
    return (
        dense / rates.matmul[work.select_type]
        + scores * cost.score
        + work.trained * work.k * work.mean_width * cost.term
        + chunks * (weights * cost.weight + cost.call)
        + further
    )
