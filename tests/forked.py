"""Processes without the time that imports take: copies of one that has imported everything and computed nothing.

A rank that starts from nothing imports for five seconds of a core, and its launcher for three more, which is most of
what a run of a few steps takes. `Forked.run` starts ranks without a launcher; `Forked.python` can be started in the
place of `python` and be handed on by launchers to their ranks. Some tests start everything from nothing, as users do
(tests/cli/test_launch.py, tests/cli/test_train_command.py).

As a script it forks a copy for each request that it gets at a socket (`tests.copies`), until its stdin is closed.
"""

import atexit
import importlib
import json
import os
import random
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from tests import strict
from tests.copies import ADDRESS, PYTHON, Copy, wait_for
from tests.everything import import_everything

ARGUMENTS = "SAEKIT_COPIES_ARGUMENTS"
"""Variable of the environment: those of the process above."""

ROOT = Path(__file__).parent.parent
RANKS = ROOT / "tests" / "ranks"
"""In PYTHONPATH, its sitecustomize gives ranks a strict group."""


def environment() -> dict[str, str]:
    """Of processes that train: one thread of the CPU each, plain lines, this saekit, and a strict group for ranks."""
    found = os.pathsep.join([str(ROOT), str(RANKS)])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CI": "true", "PYTHONPATH": found}


class Forked:
    """Starts copies; a context manager.

    Attributes:
        python: Path of what can be started in place of `python`.
        commands: A folder with `python`, `saekit`, `accelerate` and `torchrun`, for a PATH.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="copies")
        self.commands = Path(self._folder.name)
        self.python = self.commands / "python"
        started = {"python": shlex.join([sys.executable, "-IS", str(ROOT / "tests" / "copies.py")])}
        started["saekit"] = f"{self.python} -m saekit"
        started["accelerate"] = f"{self.python} -m accelerate.commands.accelerate_cli"
        started["torchrun"] = f"{self.python} -m torch.distributed.run"
        for name, command in started.items():
            (self.commands / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (self.commands / name).chmod(0o755)
        address = self.commands / "socket"
        self._names = {ADDRESS: str(address), PYTHON: str(self.python)}
        pipe = subprocess.PIPE
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(address)], env=environment(), cwd=ROOT, stdin=pipe, stdout=pipe
        )
        assert self._parent.stdout is not None
        self._parent.stdout.readline()  # it listens

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.communicate(timeout=60)
        self._folder.cleanup()

    def environment(self, **variables: object) -> dict[str, str]:
        """Of processes that `python` starts."""
        return environment() | self._names | {name: str(value) for name, value in variables.items()}

    def complete(
        self, *arguments: object, cwd: Path | None = None, environment: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run `python ARGUMENTS...`, which may start others, to its end; the result holds what it wrote.

        It has no input, and 200 seconds.
        """
        return subprocess.run(
            [str(part) for part in (self.python, *arguments)],
            cwd=cwd,
            env=environment or self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def start(self, *arguments: object, log: Path, cwd: Path, devices: bool = False, **variables: object) -> Copy:
        """Start a copy as `python ARGUMENTS...`; what it writes to stderr is added to the log."""
        nothing = os.open(os.devnull, os.O_RDWR)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            return Copy(arguments, self.environment(**variables), cwd, (nothing, nothing, said), devices=devices)
        finally:
            os.close(nothing)
            os.close(said)

    def run(
        self,
        command: list[object],
        ranks: int | None,
        log: Path,
        cwd: Path,
        timeout: float,
        script: Path | None = None,
        devices: bool = False,
    ) -> list[int]:
        """Run `saekit COMMAND...` as this many ranks, or as one process that no launcher started for None.

        With a script, that is run with these arguments in place of `saekit`. Ranks speak through a strict group
        (`tests.strict`), which with `devices` knows the host's tensors as well. What they write to stderr goes to the
        log. When one ends with an error the others are ended, as a launcher does. Returns the exit code of each.
        """
        arguments = ["-m", "saekit", *command] if script is None else [script, *command]
        port = free_port()
        launched = [launched_as(rank, ranks, port) for rank in range(ranks)] if ranks else [{}]
        copies = [self.start(*arguments, log=log, cwd=cwd, devices=devices, **variables) for variables in launched]
        return wait_for(copies, timeout)


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes that run, also for others, with this folder in their command line."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in part for part in process.cmdline()):
                found.append(process)
    return found


def free_port() -> int:
    """One below those that the system hands out by itself, so that no connection takes it before it is used."""
    while True:
        port = random.randint(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def launched_as(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank on a machine of its own."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    return {**{name: str(value) for name, value in said.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def serve(address: str) -> Callable[[], object]:
    """Answer requests until stdin is closed; in each copy return what it is to run."""
    listening, woken, wake = socket.socket(socket.AF_UNIX), *os.pipe()
    listening.bind(address)
    listening.listen()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listening, woken, 0], [], [])
        if 0 in ready:
            for child in running:
                os.kill(child, signal.SIGKILL)
            return lambda: None
        if woken in ready:
            os.read(woken, 4096)
        for child in list(running):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                _tell(running.pop(pid), os.waitstatus_to_exitcode(status))
        if listening in ready:
            asking, _ = listening.accept()
            request, files = _received(asking)
            if (child := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (listening, asking, *running.values()):
                    each.close()
                return become(request, files)
            for each in files:
                os.close(each)
            running[child] = asking
            _tell(asking, child)


def _tell(asking: socket.socket, number: int) -> None:
    with suppress(OSError):  # who asked is gone
        asking.sendall(number.to_bytes(4, "big", signed=True))


def _received(asking: socket.socket) -> tuple[dict, list[int]]:
    length, files, _, _ = socket.recv_fds(asking, 4, 4)
    return json.loads(asking.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)), files


def become(request: dict, files: list[int]) -> Callable[[], object]:
    """Turn this copy into the process that was asked for, up to its first line of code; return what that runs."""
    import fcntl  # there is none on Windows, where nothing forks

    os.setsid()
    *standard, alive = files
    # The system kills this process when the other end of the pipe is closed, as it is when who asked has ended.
    fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(alive, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(alive, fcntl.F_SETFL, fcntl.fcntl(alive, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([alive], [], [], 0)[0]:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)
    for target, source in enumerate(standard):
        os.dup2(source, target)
        os.close(source)
    # A shell that starts the tests in the background has Ctrl-C ignored, and a process inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(line_buffering=output.isatty(), write_through=bool(request.get("unbuffered")))
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.executable = os.environ[PYTHON]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [path for path in paths if path not in sys.path]
    # saekit asks what its launcher was told, and finds that in the command line of the process above it: ours.
    if launcher := os.environ.get(ARGUMENTS):
        importlib.import_module("saekit.placement.launcher").launchers_command = partial(json.loads, launcher)
    os.environ[ARGUMENTS] = json.dumps(request["arguments"])
    if "LOCAL_RANK" in os.environ and str(RANKS) in paths:
        strict.install(devices=bool(request.get("devices")))
    return program(*request["arguments"])


def program(what: str, *arguments: str) -> Callable[[], object]:
    """What `python WHAT ARGUMENTS...` runs."""
    if what == "-c":
        code, *arguments = arguments
        sys.argv = ["-c", *arguments]
        return partial(exec, compile(code, "<string>", "exec"), {"__name__": "__main__"})
    if what == "-m":
        module, *arguments = arguments
        sys.argv = ["-m", *arguments]
        sys.path.insert(0, os.getcwd())
        if not hasattr(sys.modules.get(module), "__path__"):
            sys.modules.pop(module, None)  # else runpy warns that it has been imported before
        return partial(runpy.run_module, module, run_name="__main__", alter_sys=True)
    sys.argv = [what, *arguments]
    sys.path.insert(0, str(Path(what).parent))
    return partial(runpy.run_path, what, run_name="__main__")


def run_to_its_end(work: Callable[[], object]) -> None:
    """Run it and end this process as Python would, but for taking everything apart, which would copy all memory."""
    code: object = 0
    try:
        work()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as error:  # noqa: BLE001  # shown, as Python shows it
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        code = 1
    for output in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            output.flush()
    os._exit(int(code or 0) & 0xFF)


if __name__ == "__main__":
    import_everything()
    run_to_its_end(serve(sys.argv[1]))
