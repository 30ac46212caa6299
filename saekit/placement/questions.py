"""A placement's answers before it runs: the planner, the wizard and the command line ask classes, not names."""

from __future__ import annotations

from typing import ClassVar, Literal

from saekit.config import TrainConfig
from saekit.errors import UserError
from saekit.placement.costs import ADAM, FLOAT32, NO_TRAFFIC, Costs, Traffic, Workload

Travels = Literal["nothing", "activations", "gradients", "weights"]
"""The largest of what moves between ranks; gradients move with the weights."""


class Questions:
    """The answers of a placement that holds every coder whole on every rank; other placements override them."""

    name: ClassVar[str]
    """As in `--placement` and in `saekit.registry.PLACEMENTS`."""
    title: ClassVar[str]
    """A few words for the wizard: what the placement does."""
    ranked: ClassVar[bool] = True
    """Whether a launcher starts its processes; if not, it is one process."""
    travels: ClassVar[Travels] = "nothing"
    owns_gradient: ClassVar[bool] = True
    """Whether the rank that steps a coder has its whole gradient without other ranks: it may be left to the step."""
    keeps_gradients: ClassVar[bool] = False
    """Whether the memory of gradients is kept from step to step; if not, each step allocates it."""
    gathers: ClassVar[bool] = False
    """Whether a sharded coder is gathered, on every rank, while it computes."""
    buffer_bytes: ClassVar[int] = 0
    """Bytes of buffers for what is travelling, in addition to the coder that computes."""
    deepspeed: ClassVar[bool] = False
    """Whether it trains with DeepSpeed; then a launch file that says DeepSpeed means it."""
    offloads: ClassVar[bool] = False
    """Whether it can keep parameters and optimizer state in the machine's memory instead of the GPU's."""
    shards_lm: ClassVar[bool] = False
    """Whether it can shard the language model over the ranks (`--shard-lm`)."""
    takes_layer_map: ClassVar[bool] = False
    """Whether `--layer-map` means something to it."""

    @classmethod
    def supports(cls, train: TrainConfig) -> str | None:
        """Say why these options cannot be trained under this placement, as an error message; None if they can."""
        if train.shard_lm and not cls.shards_lm:
            return f"--shard-lm, but the placement is {cls.name}, which does not shard the language model: zero3 does"
        if train.layer_map is not None and cls.ranked and not cls.takes_layer_map:
            return f"--layer-map {train.layer_map} has no meaning under --placement {cls.name}"
        return None

    @classmethod
    def check(cls, train: TrainConfig) -> None:
        """Refuse options that this placement does not support, before anything is loaded.

        Raises:
            UserError: If it does not support them.
        """
        if (reason := cls.supports(train)) is not None:
            raise UserError(reason)

    @classmethod
    def holds(cls, rank: int, hookpoints: Costs, world_size: int, layer_map: str | None = None) -> tuple[str, ...]:
        """Return the hookpoints whose coders a rank holds, whole or in part, in the order of `hookpoints`.

        Args:
            rank: The rank.
            hookpoints: All of the run's, in model order, with what a step of each costs relative to the others.
            world_size: Ranks.
            layer_map: `--layer-map`.

        Raises:
            UserError: If `layer_map` does not fit.
        """
        return tuple(hookpoints)

    @classmethod
    def parts(cls, world_size: int) -> int:
        """Return the number of parts into which each coder is cut; a rank holds one of them."""
        return 1

    @classmethod
    def rows(cls, tokens: int, world_size: int) -> int:
        """Return the number of tokens that a coder trains on at a time, if each rank reads `tokens`."""
        return tokens

    @classmethod
    def in_flight(cls, number: int, owned: int, layers: int, world_size: int) -> tuple[int, ...]:
        """Return the tensors of activations on a rank while it trains one of its coders, as multiples of one layer's.

        Args:
            number: Which of its coders, from 0.
            owned: How many it trains.
            layers: How many all ranks train.
            world_size: Ranks.

        Returns:
            For each tensor how many times a layer's activations of this rank's micro-batch it holds.
        """
        return (1,) * (layers - number)

    @classmethod
    def traffic(cls, load: Workload, owned: int | None = None) -> Traffic:
        """Return the bytes that one rank sends and receives per optimizer step.

        They do not include what does not grow with the SAEs: token counts, statistics at reports.

        Args:
            load: The step; its tokens are taken as the same on every rank.
            owned: Layers that this rank holds; all of them by default.
        """
        return NO_TRAFFIC

    @classmethod
    def memory(cls, load: Workload, owned: int | None = None, state: int = ADAM) -> int:
        """Return the bytes of parameters, gradients and optimizer state that one rank holds when the optimizer steps.

        Less where gradients are left to the step; a coder that is gathered while it computes is not counted.

        Args:
            load: The run.
            owned: Layers that this rank holds; all of them by default.
            state: Bytes of optimizer state per parameter.
        """
        held = load.layers if owned is None else owned
        return round((2 * FLOAT32 + state) * load.params * held / cls.parts(load.world_size))
