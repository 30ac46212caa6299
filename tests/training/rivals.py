"""Processes that fight over one run's folder."""

import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from tests.forked import Forked
from tests.training.killer import steps

WAYS = {"start": [], "overwrite": ["--overwrite"], "resume": ["--resume"], "auto": ["--resume", "auto"]}
"""Ways to begin in a run's folder."""


@dataclass
class Rivals:
    """Starts processes that train in one folder."""

    forked: Forked
    root: Path
    command: list[object]

    def begin(self, run, way, log):
        """One process."""
        command = [*self.command, "--run-name", run, *WAYS[way]]
        return self.forked.start("-m", "saekit", *command, log=self.root / log, cwd=self.root)

    def until(self, condition, *children):
        """Wait, unless one of the processes ends before."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            for child in children:
                assert child.poll() is None, "it has ended"
            time.sleep(0.005)

    def prepare(self):
        """A run that was not interrupted, and one that was stopped and has saved."""
        assert self.begin("whole", "start", "whole.log").wait(60) == 0
        since, child = time.time(), self.begin("begun", "start", "begun.log")
        self.until(lambda: steps(self.root / "begun", since) >= 30, child)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0

    def held(self, first, then):
        """One process trains and is paused; four others come, one of each kind. Then it goes on, or is killed.

        Returns:
            Its process id and exit code; whether it had saved a checkpoint; the others' codes and what they said, by
            kind; whether they left the folder as it was.
        """
        name = f"{first}-{then}"
        run = self.root / name
        if first != "start":
            shutil.copytree(self.root / "begun", run, symlinks=True)
        since, owner = time.time(), self.begin(name, first, f"{name}.log")
        self.until(lambda: steps(run, since) >= 5, owner)
        owner.send_signal(signal.SIGSTOP)
        before, saved = listing(run), any(run.glob("step_*"))
        others = {way: self.begin(name, way, f"{name}-{way}.log") for way in WAYS}
        codes = {way: child.wait(60) for way, child in others.items() if way != "auto"}
        self.until(lambda: "Waiting for" in self.said(f"{name}-auto.log"), others["auto"])
        same = listing(run) == before
        owner.send_signal(signal.SIGCONT if then == "goes on" else signal.SIGKILL)
        code = owner.wait(60)
        codes["auto"] = others["auto"].wait(90)
        said = {way: self.said(f"{name}-{way}.log") for way in WAYS}
        return {"run": name, "pid": owner.pid, "code": code, "saved": saved, "codes": codes, "said": said, "same": same}

    def race(self, *ways):
        """Several processes begin at the same moment.

        Returns:
            Their exit codes, and what they said.
        """
        name = "-".join(ways)
        if "start" not in ways:
            shutil.copytree(self.root / "begun", self.root / name, symlinks=True)
        logs = [f"{name}-{number}.log" for number in range(len(ways))]
        children = [self.begin(name, way, log) for way, log in zip(ways, logs, strict=True)]
        codes = [child.wait(90) for child in children]
        return {"run": name, "codes": codes, "said": [self.said(log) for log in logs]}

    def said(self, log):
        """What a process has said so far."""
        return (self.root / log).read_text("utf-8") if (self.root / log).exists() else ""


def listing(run):
    """List a run's files with their sizes and modification times."""
    return {str(f): (f.lstat().st_size, f.lstat().st_mtime) for f in sorted(run.rglob("*")) if f.name != ".lock"}
