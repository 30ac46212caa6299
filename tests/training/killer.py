"""Runs one command again and again, and kills it at random moments, so often amid each part."""

import contextlib
import itertools
import json
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.forked import Forked


def steps(run, since):
    """How many steps this life has reported: not what earlier ones have, to which a resumed run cuts the file back."""
    with contextlib.suppress(FileNotFoundError):
        whole, _, _ = (run / "metrics.jsonl").read_text("utf-8").rpartition("\n")  # a last line may be on its way
        own = itertools.takewhile(lambda line: json.loads(line)["time"] > since, reversed(whole.splitlines()))
        return sum('"layers": ' in line for line in own)
    return 0


def saves(run, since):
    """Whether this life is writing a checkpoint: not whether an earlier one has left a part of one."""
    for part in run.glob(".step_*.partial"):
        with contextlib.suppress(FileNotFoundError):
            if part.stat().st_ctime > since:
                return True
    return False


@dataclass
class Killer:
    """Lets one life begin after the other, and ends each.

    A life is a process with a signal of its own, but a copy of one that has imported everything.
    """

    forked: Forked
    run: Path
    command: list[object]
    chance: random.Random
    start_takes: float = 1.0
    """Seconds from a life's begin to its first step, as the last one that came so far took."""

    def live(self):
        """Begin a life."""
        return self.forked.start("-m", "saekit", *self.command, log=self.run.with_suffix(".log"), cwd=self.run.parent)

    def live_and_die(self, aim):
        """Kill amid the start, the training or a save; returns the exit code and which of them it was.

        It need not be the one aimed at: a start may be over and a save done before the signal arrives. Steps are
        counted, not seconds, so that a fast machine does not get further in one life than a slow one. Amid a save it
        is a later one than the life's first, so that the next life goes on from elsewhere.
        """
        since, began = time.time(), time.monotonic()
        child = self.live()
        moment = began + self.chance.uniform(0.0, self.start_takes)
        enough = self.chance.randint(*{"start": (1, 1), "step": (1, 12), "save": (4, 7)}[aim])
        done = 0
        while not (aim == "start" and time.monotonic() > moment):
            if (code := child.poll()) is not None:
                return code, aim
            before, done = done, steps(self.run, since)
            if done and not before:
                self.start_takes = time.monotonic() - began
            if done >= enough and (aim != "save" or saves(self.run, since)):
                time.sleep(self.chance.uniform(0.0, 0.01))
                break
            time.sleep(0.003)  # a save takes longer
        child.kill()
        return child.wait(), "save" if saves(self.run, since) else "step" if steps(self.run, since) else "start"

    def until_done(self, wanted):
        """Kill at least as often as wanted amid each, then let the command end.

        Returns:
            How often it killed amid what, which is less only where the command ended before.
        """
        log = self.run.with_suffix(".log")
        killed = Counter(dict.fromkeys(wanted, 0))
        while missing := [amid for amid, kills in wanted.items() for _ in range(kills - killed[amid])]:
            code, amid = self.live_and_die(self.chance.choice(missing))
            if code != -signal.SIGKILL:
                assert code == 0, log.read_text()
                return killed
            killed[amid] += 1
        assert self.live().wait(120) == 0, log.read_text()
        return killed
