"""Run on every rank by test_offloaded.py: `saekit` with offloading, and with a gradient that is NaN once.

Two options come on top: `--offload optimizer,param`, as a launch file says it, and `--bad-gradient STEP:HOOKPOINT`.
"""

import os
import sys

from torch import Tensor

from saekit.cli import main
from saekit.placement.local import LocalBank
from saekit.placement.zero3 import Zero3


def taken(option: str, otherwise: str = "") -> str:
    """An option's value, which is taken out of the command line."""
    if option not in sys.argv:
        return otherwise
    at = sys.argv.index(option)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


def spoil(kind: type, bad_step: int, bad_hookpoint: str) -> None:
    """Make the gradient of a layer's bias NaN on the first rank, in one step."""
    backward, collect, ended = kind.backward, kind.collect, []

    def spoiling(self, hookpoint: str, loss: Tensor) -> None:
        bad = (len(ended) + 1, hookpoint, self.rank) == (bad_step, bad_hookpoint, 0)
        hook = self.sae(hookpoint).b_enc.register_hook(lambda gradient: gradient * float("nan")) if bad else None
        backward(self, hookpoint, loss)
        if hook is not None:
            hook.remove()

    def counting(self) -> dict[str, Tensor]:
        ended.append(1)
        return collect(self)

    kind.backward, kind.collect = spoiling, counting


if __name__ == "__main__":
    for what in taken("--offload").split(","):
        if what not in ("", "none"):
            os.environ[f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE"] = "cpu"
    if where := taken("--bad-gradient"):
        step, hookpoint = where.split(":")
        for kind in (LocalBank, Zero3):
            spoil(kind, int(step), hookpoint)
    main()
