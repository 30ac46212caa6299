"""What a placement class says about itself before it runs: the planner, the wizard and the CLI ask it."""

from __future__ import annotations

from typing import ClassVar, Literal

from saekit.config import TrainConfig
from saekit.errors import UserError
from saekit.placement.costs import ADAM, FLOAT32, NO_TRAFFIC, Costs, Traffic, Workload

Travels = Literal["nothing", "activations", "gradients", "weights"]
"""The largest thing that travels between ranks. With `weights`, gradients travel too."""


class Questions:
    """The answers of a placement that holds every coder whole on every rank. Other placements override them."""

    name: ClassVar[str]
    """The name in `--placement` and in `saekit.registry.PLACEMENTS`."""
    title: ClassVar[str]
    """What the placement does, in a few words for the wizard."""
    ranked: ClassVar[bool] = True
    """Whether a launcher starts its processes. If not, it has one process."""
    travels: ClassVar[Travels] = "nothing"
    """The largest thing that travels between ranks."""
    owns_gradient: ClassVar[bool] = True
    """Whether the rank that steps a coder has its whole gradient without other ranks, so that it may be deferred."""
    keeps_gradients: ClassVar[bool] = False
    """Whether the memory of gradients is kept between steps. If not, each step allocates it."""
    gathers: ClassVar[bool] = False
    """Whether every rank gathers a sharded coder while it computes."""
    buffer_bytes: ClassVar[int] = 0
    """Bytes of communication buffers, in addition to the coder that computes."""
    deepspeed: ClassVar[bool] = False
    """Whether it trains with DeepSpeed. A launch file that enables DeepSpeed then chooses this placement."""
    offloads: ClassVar[bool] = False
    """Whether it can keep parameters and optimizer state in the machine's memory instead of the GPU's."""
    shards_lm: ClassVar[bool] = False
    """Whether it can shard the language model over the ranks (`--shard-lm`)."""
    takes_layer_map: ClassVar[bool] = False
    """Whether it supports `--layer-map`."""

    @classmethod
    def supports(cls, train: TrainConfig) -> str | None:
        """Return an error message if this placement does not support the options; None if it does."""
        if train.shard_lm and not cls.shards_lm:
            return f"--shard-lm is not supported by --placement {cls.name}: use zero3, or leave it out"
        if train.layer_map is not None and cls.ranked and not cls.takes_layer_map:
            return f"--layer-map {train.layer_map} has no meaning under --placement {cls.name}: leave it out"
        return None

    @classmethod
    def check(cls, train: TrainConfig) -> None:
        """Check that this placement supports the options, before anything is loaded.

        Raises:
            UserError: If it does not.
        """
        if (reason := cls.supports(train)) is not None:
            raise UserError(reason)

    @classmethod
    def holds(cls, rank: int, hookpoints: Costs, world_size: int, layer_map: str | None = None) -> tuple[str, ...]:
        """Return the hookpoints whose coders a rank holds, whole or in part, in the order of `hookpoints`.

        Args:
            rank: The rank.
            hookpoints: All hookpoints of the run in model order, with the relative cost of a step of each.
            world_size: The number of ranks.
            layer_map: `--layer-map`.

        Raises:
            UserError: If `layer_map` does not fit.
        """
        return tuple(hookpoints)

    @classmethod
    def parts(cls, world_size: int) -> int:
        """Return the number of parts into which each coder is cut. Each rank holds one part."""
        return 1

    @classmethod
    def rows(cls, tokens: int, world_size: int) -> int:
        """Return the number of tokens that a coder trains on at a time if each rank reads `tokens`."""
        return tokens

    @classmethod
    def in_flight(cls, number: int, owned: int, layers: int, world_size: int) -> tuple[int, ...]:
        """Return the sizes of the tensors of activations on a rank while it trains one of its coders.

        Args:
            number: The number of that coder among the rank's, from 0.
            owned: The number of coders that the rank trains.
            layers: The number of coders that all ranks train.
            world_size: The number of ranks.

        Returns:
            The size of each tensor, as a multiple of one layer's activations of this rank's micro-batch.
        """
        return (1,) * (layers - number)

    @classmethod
    def traffic(cls, load: Workload, owned: int | None = None) -> Traffic:
        """Return the bytes that one rank sends and receives per optimizer step.

        They do not include messages whose size does not grow with the SAEs: token counts and statistics.

        Args:
            load: The step. Every rank is assumed to have the same number of tokens.
            owned: Layers that this rank holds. By default, all of them.
        """
        return NO_TRAFFIC

    @classmethod
    def memory(cls, load: Workload, owned: int | None = None, state: int = ADAM) -> int:
        """Return the bytes of parameters, gradients and optimizer state that one rank holds when the optimizer steps.

        Deferred gradients take less than this. A coder that is gathered while it computes takes additional memory.

        Args:
            load: The run.
            owned: Layers that this rank holds. By default, all of them.
            state: Bytes of optimizer state per parameter.
        """
        held = load.layers if owned is None else owned
        return round((2 * FLOAT32 + state) * load.params * held / cls.parts(load.world_size))
