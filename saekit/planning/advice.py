"""Advice for a run that does not fit, found by planning it again with each change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from saekit.config import RunConfig
from saekit.placement.choose import kind_of
from saekit.planning.memory import NO_OFFLOAD, Offload
from saekit.planning.plan import Choice, Plan, make_plan

MOST_CHUNKS = 64
WORTH = 0.99
"""A change that leaves more than this share of the memory is not one."""


@dataclass(frozen=True)
class Advice:
    """A change, and what it makes of the placement that then needs least."""

    options: tuple[str, ...]
    """To be added to the command, or put in place of those of the same name."""
    choice: Choice
    layers: int
    """SAEs that are trained then."""


class Attempt(NamedTuple):
    """The run with some options changed."""

    cfg: RunConfig
    offload: Offload
    asked: str | None
    options: tuple[str, ...] = ()

    def having(self, option: str, **train: Any) -> Attempt:
        """With more options, which set these fields."""
        cfg = replace(self.cfg, train=replace(self.cfg.train, **train)) if train else self.cfg
        return self._replace(cfg=cfg, options=(*self.options, option))


Change = Callable[[Attempt, Plan], Iterator[Attempt]]
"""The same change in growing degrees."""


def advise(plan: Plan) -> list[Advice]:
    """Changes that make a plan fit, or bring it nearer; nothing if it fits as it is.

    Each kind of change by itself, in the least degree that fits, or else in the one that saves most. If none of them
    is enough, or training fewer layers alone is, the last advice is several of them together, as few as it takes in
    the order of `CHANGES`; it may not be enough either.
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
    """Return the first degree of a change that fits, or the one that saves most; None if it saves nothing.

    Args:
        change: The kind of change.
        start: What it is made to.
        plan: The plan without any change.
        before: What `start` came to; the plan if None.
    """
    best, least = None, (before.choice if before else _least(plan)).total
    for attempt in change(start, plan):
        again = make_plan(attempt.cfg, plan.job.machine, offload=attempt.offload, asked=attempt.asked)
        choice = _least(again)
        if choice.fits or choice.total < WORTH * least:
            best, least = (attempt, Advice(attempt.options, choice, len(again.job.units))), choice.total
        if choice.fits:
            break
    return best


def _chunks(start: Attempt, plan: Plan) -> Iterator[Attempt]:
    """Smaller chunks of tokens; nothing else changes."""
    count = start.cfg.train.micro_acc_steps
    while (count := 2 * count) <= min(MOST_CHUNKS, plan.job.ctx_len * start.cfg.train.batch_size):
        yield start.having(f"--micro-acc-steps {count}", micro_acc_steps=count)


def _micro_batches(start: Attempt, _: Plan) -> Iterator[Attempt]:
    """Smaller micro-batches of the same global batch."""
    batch_size, steps = start.cfg.train.batch_size, start.cfg.train.grad_acc_steps
    while batch_size % 2 == 0:
        batch_size, steps = batch_size // 2, 2 * steps
        option = f"--batch-size {batch_size} --grad-acc-steps {steps}"
        yield start.having(option, batch_size=batch_size, grad_acc_steps=steps)


def _eight_bits(start: Attempt, plan: Plan) -> Iterator[Attempt]:
    """Yield the language model in 8 bits, which needs a GPU and is not cut among ranks."""
    model = start.cfg.model
    if plan.job.machine.on_gpu and not model.load_in_8bit and not start.cfg.train.shard_lm:
        attempt = start.having("--load-in-8bit")
        yield attempt._replace(cfg=replace(start.cfg, model=replace(model, load_in_8bit=True)))


def _moments(start: Attempt, _: Plan) -> Iterator[Attempt]:
    """Adam's moments in 16 bits."""
    train = start.cfg.train
    if train.optimizer == "adam" and train.moments_dtype == "fp32":
        yield start.having("--moments-dtype bf16", moments_dtype="bf16")


def _offloading(start: Attempt, plan: Plan) -> Iterator[Attempt]:
    """Parameters and optimizer state in the machine's memory, under placements that can offload."""
    names = [choice.placement for choice in plan.considered if kind_of(choice.placement).offloads]
    if plan.job.machine.on_gpu and start.offload == NO_OFFLOAD:
        for name in names:
            yield start.having(f"--launch {name}-offload")._replace(offload=Offload(True, True), asked=name)


def _fewer_layers(start: Attempt, plan: Plan) -> Iterator[Attempt]:
    """Yield every second one of the layers, every third, ...; the others can be trained by further runs."""
    train, layers = start.cfg.train, plan.job.layers
    outside = any(each.site.layer is None for each in plan.job.units)
    if train.layer_map is not None or outside:  # it names the layers, too
        return
    for stride in range(2, len(layers) + 1):
        if train.layers is None:
            together = stride * train.layer_stride
            yield start.having(f"--layer-stride {together}", layer_stride=together)
        else:
            some = layers[::stride]
            yield start.having(f"--layers {','.join(map(str, some))}", layers=some)


CHANGES: tuple[Change, ...] = (_chunks, _micro_batches, _moments, _eight_bits, _offloading, _fewer_layers)
"""In the order in which they are put together: first what changes nothing but the time, last what trains less."""
