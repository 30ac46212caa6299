"""Real ranks without a launcher: each is a copy of a process that has imported everything and computed nothing.

A rank that starts from nothing imports for five seconds of a core, and its launcher for three more, which is most of
what a run of a few steps takes. What launchers themselves do is tested with launchers (tests/cli/test_launch.py,
tests/placement/test_failures.py, `launch_file`).

As a script it reads requests, one JSON object per line, and answers each with the ranks' exit codes.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

from saekit.cli import main
from tests import strict

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """Of processes that train: one thread of the CPU each, plain lines, this saekit, and a strict group for ranks."""
    found = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "ranks")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CI": "true", "PYTHONPATH": found}


class Forked:
    """Starts ranks of `saekit`; a context manager."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"], env=environment(), cwd=ROOT, stdin=pipe, stdout=pipe, text=True
        )

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.communicate(timeout=60)

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

        With a script, that is run with these arguments in the place of `saekit`. Ranks speak through a strict group
        (`tests.strict`), which with `devices` knows the host's tensors as well. What they write to stderr goes to the
        log. When one ends with an error the others are ended, as a launcher does. Returns the exit code of each.
        """
        request = {
            "command": [str(part) for part in command],
            "ranks": ranks,
            "log": str(log),
            "cwd": str(cwd),
            "timeout": timeout,
            "script": None if script is None else str(script),
            "devices": devices,
        }
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())


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


def become(command: list[str], log: str | Path) -> None:
    """Turn this copy into a process of `saekit COMMAND...`, up to its first line of code; stderr goes to the log."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for target, source in enumerate((nothing, nothing, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND))):
        os.dup2(source, target)
    sys.argv = ["saekit", *command]


def wait_for(children: list[int], timeout: float) -> list[int]:
    """The exit codes, once all have ended; from the first error on the others have as long as a launcher gives."""
    codes: dict[int, int] = {}
    until, failed = time.monotonic() + timeout, False
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        if not failed and any(codes.values()):
            failed, until = True, time.monotonic() + 30
            send(signal.SIGTERM, set(children) - codes.keys())
        if time.monotonic() > until:
            send(signal.SIGKILL, set(children) - codes.keys())
        time.sleep(0.02)
    return [codes[child] for child in children]


def send(number: int, children: set[int]) -> None:
    for child in children:
        os.kill(child, number)


def serve() -> Callable[[], object] | None:
    """Answer requests until there are none; in each copy that is to go on as a rank, return what it is to run."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        ranks, port = request["ranks"], free_port()
        children = []
        for rank in range(ranks or 1):
            if (child := os.fork()) == 0:
                os.environ.update(launched_as(rank, ranks, port) if ranks else {})
                os.chdir(request["cwd"])
                become(request["command"], request["log"])
                if ranks:
                    strict.install(devices=request["devices"])
                script = request["script"]
                return main if script is None else partial(runpy.run_path, script, run_name="__main__")
            children.append(child)
        sys.stdout.write(json.dumps(wait_for(children, request["timeout"])) + "\n")
        sys.stdout.flush()
    return None


def import_everything() -> None:
    """What training will import, so that copies of this process need not; sets torch to one thread."""
    import torch

    import saekit.training.launch  # noqa: F401

    torch.set_num_threads(1)
    with suppress(RuntimeError):  # it has been set before
        torch.set_num_interop_threads(1)
    # At first use they import the language model's own module, and DeepSpeed, by way of a `torch.compile`, these two.
    models = [f"transformers.models.{model}.modeling_{model}" for model in ("gpt2", "llama")]
    with redirect_stdout(sys.stderr):  # DeepSpeed says there what it found; answers go to stdout
        for module in ["datasets", *models, "torch._inductor.compile_fx", "torch._dynamo.repro.after_dynamo"]:
            importlib.import_module(module)
        with suppress(ImportError):
            importlib.import_module("deepspeed")
        # A second of regular expressions that loading any model compiles.
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("gpt2")
    gc.collect()
    gc.freeze()  # the ranks' own collections need not look at all of this again
    atexit.register(gc.unfreeze)  # else libraries take it for leaked at the end, and say so


if __name__ == "__main__":
    import_everything()
    if (work := serve()) is not None:
        work()
