"""Runs one command again and again, and kills it at random moments; a script of its own.

Each life is a process with a signal of its own, but a copy of this one, which has imported everything and computed
nothing: dying thirty times takes seconds that way. Half of the kills wait for a save to begin.

Usage: python -m tests.training.killer SEED KILLS RUN_DIR COMMAND...
Prints as JSON how often it killed, and how often amid a save.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import saekit.training.launch
from saekit.cli import main


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


def saving(run):
    """Whether a checkpoint is being written."""
    return any(run.glob(".step_*"))


def live_and_die(child, run, chance):
    """Kill at a random moment, or at one amid a save; returns the exit code and whether it was in a save."""
    amid_a_save = chance.random() < 0.5
    moment = time.monotonic() + chance.uniform(0.0, 1.2)
    while time.monotonic() < moment or amid_a_save:
        if (code := ended(child)) is not None:
            return code, False
        if amid_a_save and time.monotonic() > moment and saving(run):
            time.sleep(chance.uniform(0.0, 0.01))
            break
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, saving(run)


def until_done(seed, kills, run, command):
    """Returns how often it killed, and how often amid a save."""
    chance = random.Random(seed)
    log = run.with_suffix(".log")
    killed = in_saves = 0
    while killed < kills:
        code, in_save = live_and_die(start(command, log), run, chance)
        if code == -signal.SIGKILL:
            killed, in_saves = killed + 1, in_saves + in_save
        else:
            assert code == 0, log.read_text()
            return killed, in_saves
    code = os.waitstatus_to_exitcode(os.waitpid(start(command, log), 0)[1])
    assert code == 0, log.read_text()
    return killed, in_saves


if __name__ == "__main__":
    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):
        torch.set_num_interop_threads(1)
    assert saekit.training.launch  # imported once, for all lives
    sys.stdout.write(json.dumps(until_done(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])))
