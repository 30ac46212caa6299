"""Run on every rank by test_doctor.py: `saekit doctor` on a cluster with a fault, which the first argument names."""

import os
import sys
import time
from dataclasses import replace

from saekit.cli import main
from saekit.doctor import watch
from saekit.placement import network, trial

SECOND = os.environ["RANK"] == "1"


def stuck():
    """The second rank does not come to a collective; time runs out soon after all have begun with it."""
    real = trial.collectives

    def with_sleep(placement):
        found = real(placement)
        if SECOND:
            found["all_gather"] = lambda: time.sleep(1000)
        return found

    at = watch.Watch.at

    def hurried(self, stage):
        at(self, stage)
        if stage == "all_gather":
            self._until = time.monotonic() + 2

    trial.collectives, watch.Watch.at = with_sleep, hurried


def raising():
    """The second rank fails while the first waits for it."""
    real = trial.collectives

    def no_memory():
        raise RuntimeError("out of memory\nand more")

    def with_error(placement):
        found = real(placement)
        if SECOND:
            found["broadcast"] = no_memory
        return found

    trial.collectives = with_error


def apart():
    """The second rank is on a machine with a disk, a clock and a torch of its own."""
    if not SECOND:
        return
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    now, introduce = time.time, trial.introduce

    def of_another_machine(about):
        return replace(about, host="other", versions={**about.versions, "torch": "2.0.0"})

    def introduced(placement):
        gather = placement.gather
        placement.gather = lambda about: gather(of_another_machine(about))
        found = introduce(placement)
        placement.gather = gather
        return found

    trial.introduce, trial.time.time, trial.VISIBLE_WITHIN = introduced, lambda: now() + 90, 0.5


if __name__ == "__main__":
    os.dup2(2, 1)  # both outputs to the test's log
    network.SIZE, network.ROUNDS = 2**20, 1
    fault = sys.argv.pop(1)
    {"none": lambda: None, "stuck": stuck, "raising": raising, "apart": apart}[fault]()
    main()
