"""Gives advice for a run that does not fit, by planning it again with each change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from saekit.config import RunConfig
from saekit.placement.choose import kind_of
from saekit.planning.memory import NO_OFFLOAD, Offload
from saekit.planning.plan import Choice, Plan, make_plan

MAX_CHUNKS = 64
"""The largest `--micro-acc-steps` that is advised."""
WORTHWHILE = 0.99
"""A change is not advised if it leaves more than this share of the memory in use."""


@dataclass(frozen=True)
class Advice:
    """A change to a run, and the plan with it."""

    options: tuple[str, ...]
    """Options to add to the command, or to replace those of the same name."""
    choice: Choice
    """The placement that needs the least memory with the change."""
    layers: int
    """SAEs that are trained with the change."""


class Attempt(NamedTuple):
    """A run with some options changed."""

    cfg: RunConfig
    offload: Offload
    asked: str | None
    options: tuple[str, ...] = ()

    def with_option(self, option: str, **train: Any) -> Attempt:
        """Return the attempt with one more option, which sets these fields of the training's configuration."""
        cfg = replace(self.cfg, train=replace(self.cfg.train, **train)) if train else self.cfg
        return self._replace(cfg=cfg, options=(*self.options, option))


Change = Callable[[Attempt, Plan], Iterator[Attempt]]
"""Yields attempts with one kind of change, from the smallest degree to the largest."""


def advise(plan: Plan) -> list[Advice]:
    """Find changes that make a plan fit, or that bring it closer; none if it fits already.

    Each kind of change is advised by itself, in the smallest degree that fits, or otherwise in the degree that saves
    most. If no single change fits, or only training fewer layers does, the last advice combines several changes, as few
    as needed in the order of `CHANGES`. It may still not fit.
    """
    if plan.fits:
        return []
    start = Attempt(plan.job.cfg, plan.offload, plan.asked)
    single = [advice for change in CHANGES if (advice := _best(change, start, plan))]
    if any(advice.choice.fits and advice.layers == len(plan.job.units) for _, advice in single):
        return [advice for _, advice in single]
    attempt, together = start, None
    for change in CHANGES:
        if (together is None or not together.choice.fits) and (better := _best(change, attempt, plan, together)):
            attempt, together = better
    several = [together] if together is not None and len(together.options) > 1 else []
    return [advice for _, advice in single] + several


def _least(plan: Plan) -> Choice:
    return min(plan.considered, key=lambda choice: choice.total)


def _best(change: Change, start: Attempt, plan: Plan, before: Advice | None = None) -> tuple[Attempt, Advice] | None:
    """Return the first degree of a change that fits, or the one that saves most; None if none saves enough.

    Args:
        change: The kind of change.
        start: The attempt to change.
        plan: The plan without any change.
        before: The advice for `start`; None if `start` has no change yet.
    """
    best, least = None, (before.choice if before else _least(plan)).total
    for attempt in change(start, plan):
        again = make_plan(attempt.cfg, plan.job.machine, offload=attempt.offload, asked=attempt.asked)
        choice = _least(again)
        if choice.fits or choice.total < WORTHWHILE * least:
            best, least = (attempt, Advice(attempt.options, choice, len(again.job.units))), choice.total
        if choice.fits:
            break
    return best


def _chunks(start: Attempt, plan: Plan) -> Iterator[Attempt]:
    """Yield smaller chunks of tokens. The result of the training does not change."""
    count = start.cfg.train.micro_acc_steps
    while (count := 2 * count) <= min(MAX_CHUNKS, plan.job.ctx_len * start.cfg.train.batch_size):
        yield start.with_option(f"--micro-acc-steps {count}", micro_acc_steps=count)


def _micro_batches(start: Attempt, _: Plan) -> Iterator[Attempt]:
    """Yield smaller micro-batches of the same global batch."""
    batch_size, steps = start.cfg.train.batch_size, start.cfg.train.grad_acc_steps
    while batch_size % 2 == 0:
        batch_size, steps = batch_size // 2, 2 * steps
        option = f"--batch-size {batch_size} --grad-acc-steps {steps}"
        yield start.with_option(option, batch_size=batch_size, grad_acc_steps=steps)


def _eight_bits(start: Attempt, plan: Plan) -> Iterator[Attempt]:
    """Yield the language model in 8 bits, which needs a GPU and excludes sharding."""
    model = start.cfg.model
    if start.cfg.train.activations is not None:  # other weights than the cache's
        return
    if plan.job.machine.on_gpu and not model.load_in_8bit and not start.cfg.train.shard_lm:
        attempt = start.with_option("--load-in-8bit")
        yield attempt._replace(cfg=replace(start.cfg, model=replace(model, load_in_8bit=True)))


def _moments(start: Attempt, _: Plan) -> Iterator[Attempt]:
    """Yield Adam's moments in 16 bits."""
    train = start.cfg.train
    if train.optimizer == "adam" and train.moments_dtype == "fp32":
        yield start.with_option("--moments-dtype bf16", moments_dtype="bf16")


def _offloading(start: Attempt, plan: Plan) -> Iterator[Attempt]:
    """Yield parameters and optimizer state in the machine's memory, under placements that can offload."""
    names = [choice.placement for choice in plan.considered if kind_of(choice.placement).offloads]
    if plan.job.machine.on_gpu and start.offload == NO_OFFLOAD:
        for name in names:
            yield start.with_option(f"--launch {name}-offload")._replace(offload=Offload(True, True), asked=name)


def _fewer_layers(start: Attempt, plan: Plan) -> Iterator[Attempt]:
    """Yield every second layer, every third, and so on. Further runs can train the others."""
    train, layers = start.cfg.train, plan.job.layers
    outside = any(each.site.layer is None for each in plan.job.units)
    if train.layer_map is not None or outside:  # a layer map names all layers, so fewer would not fit it
        return
    if train.activations is not None:  # it need not hold whole layers
        return
    for stride in range(2, len(layers) + 1):
        if train.layers is None:
            together = stride * train.layer_stride
            yield start.with_option(f"--layer-stride {together}", layer_stride=together)
        else:
            some = layers[::stride]
            yield start.with_option(f"--layers {','.join(map(str, some))}", layers=some)


CHANGES: tuple[Change, ...] = (_chunks, _micro_batches, _moments, _eight_bits, _offloading, _fewer_layers)
"""All changes in the order in which they are combined: first those that only cost time, last what trains less."""
