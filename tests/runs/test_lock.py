"""One writer per run: on a disk of this machine, and where `flock` means nothing or is not there."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from saekit.errors import UserError
from saekit.runs import lock
from saekit.runs.lock import hold

ROOT = Path(__file__).parents[2]
DISKS = {
    "local": "",
    "other machines do not see flock": "lock.SETTLES = 0.3; lock.is_local_disk = lambda path: False",
    "no flock": "lock.SETTLES = 0.3; lock.is_local_disk = lambda path: False; lock.flock = lambda descriptor: None",
}
PROGRAM = """
import os, sys, time
from pathlib import Path
from saekit.errors import UserError
from saekit.runs import lock
{disk}
say = lambda text: os.write(1, (text + chr(10)).encode())  # in one piece, also where two processes speak at once
{before}
try:
    with lock.hold(Path(sys.argv[1]), float(sys.argv[2]), say):
        say("held")
        {inside}
        sys.stdin.readline()
except UserError as error:
    say(f"refused: {{error}}")
"""


started = []


class Process:
    """Takes the lock, and gives it back when it is told to."""

    def __init__(self, folder, disk, patience=0.0, before="", inside=""):
        program = PROGRAM.format(disk=DISKS[disk], before=before, inside=inside)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.child = subprocess.Popen(
            [sys.executable, "-c", program, str(folder), str(patience)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.child.pid
        started.append(self)

    def says(self):
        return self.child.stdout.readline().strip()

    def ends(self):
        self.child.communicate("\n", timeout=60)
        assert self.child.returncode == 0

    def is_killed(self):
        self.child.kill()
        with self.child:  # waits, and closes the pipes
            pass


@pytest.fixture(autouse=True)
def _all_end():
    """Also where a test has failed."""
    yield
    while started:
        started.pop().is_killed()


@pytest.fixture(params=DISKS)
def disk(request, monkeypatch):
    """The kinds of disk, for this process, too."""
    patch_disk(monkeypatch, request.param)
    return request.param


def patch_disk(monkeypatch, kind):
    if kind != "local":
        monkeypatch.setattr(lock, "SETTLES", 0.05)
        monkeypatch.setattr(lock, "is_local_disk", lambda path: False)
    if kind == "no flock":
        monkeypatch.setattr(lock, "flock", lambda descriptor: None)


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path, disk):
    run = tmp_path / "some" / "run"
    first = Process(run, disk)
    assert first.says() == "held"
    (run / "file").write_text("mine")
    before = sorted(os.listdir(run))
    began = time.monotonic()
    told = rf"{run} is in use: process {first.pid} on \S+ has been training in it since 2"
    with pytest.raises(UserError, match=told), hold(run):
        pass
    assert time.monotonic() - began < 1
    assert sorted(os.listdir(run)) == before
    first.ends()
    with hold(run):
        assert (run / "file").read_text() == "mine"
    assert os.listdir(run) == ["file"]


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, disk):
    first = Process(tmp_path / "run", disk)
    assert first.says() == "held"
    first.is_killed()
    began = time.monotonic()
    with hold(tmp_path / "run"):
        assert time.monotonic() - began < 5
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_worker_that_outlives_its_process_does_not_keep_the_lock(tmp_path):
    first = Process(tmp_path / "run", "local", inside="pid = os.fork(); say(str(pid)); pid or time.sleep(60)")
    worker = {first.says(), first.says(), first.says()} - {"held", "0"}
    first.is_killed()
    try:
        with hold(tmp_path / "run"):
            pass
    finally:
        os.kill(int(worker.pop()), signal.SIGKILL)


def test_a_stopped_process_keeps_the_lock(tmp_path, disk):
    first = Process(tmp_path / "run", disk)
    assert first.says() == "held"
    first.child.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="is in use"), hold(tmp_path / "run"):
        pass
    first.child.send_signal(signal.SIGCONT)
    first.ends()


def test_one_that_may_wait_says_so_and_comes_next(tmp_path, disk):
    first = Process(tmp_path / "run", disk)
    assert first.says() == "held"
    second = Process(tmp_path / "run", disk, patience=50)
    assert second.says().startswith(
        f"Waiting for the run folder {tmp_path / 'run'}, for up to 50 seconds (--grace): process {first.pid} on "
    )
    first.ends()
    assert second.says() == "held"
    second.ends()


def test_one_that_has_waited_in_vain_says_how_long(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "ASKS", 0.05)
    first = Process(tmp_path / "run", "local")
    assert first.says() == "held"
    said = []
    with (
        pytest.raises(UserError, match=r"\(waited for 0\.2 seconds, --grace\)"),
        hold(tmp_path / "run", 0.2, said.append),
    ):
        pass
    assert len(said) == 1
    first.ends()


@pytest.mark.parametrize("kind", DISKS)
@pytest.mark.parametrize("left", ["nothing", "a lock"])
def test_of_many_at_once_one_wins(tmp_path, kind, left):
    if left == "a lock":  # of a process that has been killed: all of them see that
        first = Process(tmp_path / "run", kind)
        assert first.says() == "held"
        first.is_killed()
    together = "lock.SETTLES = 1.0; say('ready'); sys.stdin.readline()"
    rivals = [Process(tmp_path / "run", kind, before=together) for _ in range(4)]
    assert [each.says() for each in rivals] == ["ready"] * 4
    for each in rivals:
        each.child.stdin.write("\n")
        each.child.stdin.flush()
    said = [each.says() for each in rivals]
    assert said.count("held") == 1, said
    assert sum("is in use: " in each for each in said) == 3, said
    for each in rivals:
        each.ends()


def test_the_same_thread_may_and_another_may_not(tmp_path, disk):
    problems = []

    def other():
        try:
            with hold(tmp_path / "run"):
                pass
        except UserError as error:
            problems.append(str(error))

    (tmp_path / "link").symlink_to("run")
    with hold(tmp_path / "run"), hold(tmp_path / "link"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} on" in problems[0]
    assert not (tmp_path / "run").exists()
