"""Runs one command again and again, and kills it at random moments, so often amid each part; a script of its own.

Each life is a process with a signal of its own, but a copy of this one, which has imported everything and computed
nothing: starting again takes no time for imports that way.

Usage: python -m tests.training.killer SEED STARTS STEPS SAVES RUN_DIR COMMAND...
Kills at least STARTS times amid the start, STEPS times amid the training and SAVES times amid a save, then lets the
command end. Prints as JSON how often it killed amid each, which is less only where the command ended before.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from saekit.cli import main
from tests.forked import import_everything


def start(command, log):
    """One life; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["saekit", *command]
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
    finally:
        os._exit(code)


def ended(child):
    """How the process ended, if it has."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def last_change(paths):
    """When one of them was changed last, by the file system's clock; 0 if there is none."""
    changes = [0.0]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            changes.append(path.stat().st_ctime)
    return max(changes)


def trains(run, since):
    """Whether this life has reported a step."""
    metrics = run / "metrics.jsonl"
    return last_change([metrics]) > since and metrics.stat().st_size > 0


def saves(run, since):
    """Whether this life is writing a checkpoint: not whether an earlier one has left a part of one."""
    return last_change(run.glob(".step_*.partial")) > since


def live_and_die(child, run, chance, since, aim):
    """Kill amid the start, the training or a save; returns the exit code and which of them it was.

    It need not be the one aimed at: a start may be over and a save done before the signal arrives. Steps are counted,
    not seconds, so that a fast machine does not get further in one life than a slow one.
    """
    moment = time.monotonic() + chance.uniform(0.0, 1.5)
    steps = chance.randint(1, {"start": 1, "step": 25, "save": 10}[aim])
    first = None
    while True:
        if (code := ended(child)) is not None:
            return code, aim
        if aim == "start" and time.monotonic() > moment:
            break
        if trains(run, since):
            done = (run / "metrics.jsonl").read_bytes().count(b"\n")
            first = done if first is None else first
            if done >= first + steps and (aim != "save" or saves(run, since)):
                time.sleep(chance.uniform(0.0, 0.01))
                break
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, "save" if saves(run, since) else "step" if trains(run, since) else "start"


def until_done(seed, wanted, run, command):
    """Returns how often it killed amid what."""
    chance = random.Random(seed)
    log = run.with_suffix(".log")
    killed = Counter(dict.fromkeys(wanted, 0))
    while missing := [amid for amid, kills in wanted.items() for _ in range(kills - killed[amid])]:
        since = time.time()
        code, amid = live_and_die(start(command, log), run, chance, since, chance.choice(missing))
        if code != -signal.SIGKILL:
            assert code == 0, log.read_text()
            return killed
        killed[amid] += 1
    code = os.waitstatus_to_exitcode(os.waitpid(start(command, log), 0)[1])
    assert code == 0, log.read_text()
    return killed


if __name__ == "__main__":
    import_everything()
    seed, *kills = map(int, sys.argv[1:5])
    wanted = dict(zip(("start", "step", "save"), kills, strict=True))
    sys.stdout.write(json.dumps(until_done(seed, wanted, Path(sys.argv[5]), sys.argv[6:])))
