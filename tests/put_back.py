"""Put faults back, each in a copy of the committed tree of its own, and see whether a test fails."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

ROOT = Path(__file__).parents[1]
ROOMS = {
    "activations": "activations training",
    "analysis": "analysis views cli",
    "config": "config cli",
    "data": "data",
    "planning": "planning placement",
    "runs": "runs training cli",
    "sae": "sae training",
    "views": "views",
}
"""Folders whose tests are run where the tests that a fault names have passed, by the room that the fault is in."""
ELSEWHERE = "sae activations training placement"
LONGEST = 1200
"""Seconds that tests may take: a fault that makes ranks wait for each other for ever is noticed, too."""


class Fault(NamedTuple):
    """A fault that a test must notice."""

    name: str
    file: str
    """From the root of the repository."""
    good: str
    """Source text to replace; it occurs in that file exactly once."""
    bad: str
    """The replacement."""
    tests: str
    """Tests that should catch it and so run first: files, or single tests such as `training/test_norms::test_name`."""

    def suites(self) -> list[list[str]]:
        """Return groups of tests to run in turn until one fails."""
        room = self.file.split("/")[1]
        named = ["tests/{}.py{}{}".format(*each.partition("::")) for each in self.tests.split()]
        return [named, [f"tests/{each}" for each in ROOMS.get(room, ELSEWHERE).split()]]


class Verdict(NamedTuple):
    """The outcome of one fault."""

    fault: Fault
    noticed_by: list[str]
    """Tests that failed; empty if none did."""
    seconds: float


def copy_tree(folder: str) -> Path:
    """Clone what is committed into a folder."""
    copy = Path(folder) / "saekit"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
    return copy


def failures(copy: Path, tests: Sequence[str], *options: str) -> list[str]:
    """Run tests in a copy of the tree; the names of those that failed.

    Raises:
        RuntimeError: If they could not be run.
    """
    cache = copy.parent / "cache"
    command = [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={cache}", f"--basetemp={copy.parent / 'tmp'}"]
    # Processes that the tests start must read the copy, too, and not what is installed.
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    run = [*command, *options, *tests]
    try:
        done = subprocess.run(
            run, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        return [f"{' '.join(tests)} (not done after {LONGEST} s)"]
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    if done.returncode == 0:
        return []
    return list(json.loads((cache / "v" / "cache" / "lastfailed").read_text(encoding="utf-8")))


def try_fault(fault: Fault) -> Verdict:
    """Put a fault back and run tests until one fails."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = copy_tree(folder)
        text = (copy / fault.file).read_text(encoding="utf-8")
        if text.count(fault.good) != 1:
            raise RuntimeError(f"{fault.file}: expected exactly one {fault.good!r}")
        (copy / fault.file).write_text(text.replace(fault.good, fault.bad), encoding="utf-8")
        found: list[str] = []
        for tests in fault.suites():
            found = found or failures(copy, tests, "-x")
    return Verdict(fault, found, time.monotonic() - began)


def fail_anyway(tests: Sequence[str]) -> set[str]:
    """Those of some tests that fail without a fault, too: they have noticed nothing."""
    there = [test for test in tests if (ROOT / test.partition("::")[0]).is_file()]
    if not there:
        return set()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return set(failures(copy_tree(folder), there))


def main(faults: Sequence[Fault], idle: Mapping[str, str]) -> None:
    """Try faults, except in files of which `idle` says why this machine never runs them; status 1 if one was missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=main.__doc__)
    parser.add_argument("words", nargs="*", help="try only the faults whose names contain one of these")
    parser.add_argument("--jobs", type=int, default=1, help="how many to try at a time (each takes one core)")
    asked = parser.parse_args()
    wanted = [each for each in faults if not asked.words or any(word in each.name for word in asked.words)]
    chosen = [each for each in wanted if each.file not in idle]
    console, began = Console(highlight=False, soft_wrap=True), time.monotonic()
    for fault in wanted:
        if fault.file in idle:
            console.print(f"not tried       {fault.name}: {idle[fault.file]}", markup=False)
    verdicts = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for verdict in pool.map(try_fault, chosen):
            verdicts.append(verdict)
            how = "noticed" if verdict.noticed_by else "[red]MISSED [/red]"
            console.print(f"{how} {verdict.seconds:4.0f} s  {verdict.fault.name}", end="  ")
            console.print(", ".join(verdict.noticed_by), style="dim", markup=False)
    anyway = fail_anyway(sorted({test for each in verdicts for test in each.noticed_by}))
    missed = [each.fault.name for each in verdicts if set(each.noticed_by) <= anyway]
    for test in sorted(anyway):
        console.print(f"fails without a fault, too: {test}", markup=False)
    minutes = (time.monotonic() - began) / 60
    told = f"{len(chosen) - len(missed)} of {len(chosen)} faults noticed in {minutes:.0f} min"
    console.print(told + (f"; missed: {'; '.join(missed)}" if missed else ""), markup=False)
    sys.exit(bool(missed))
