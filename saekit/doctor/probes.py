"""Probes: trials that run in their own processes, because they change a process for good, may hang, and may crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from saekit.doctor.findings import describe_error

LIMIT_S = 60.0
"""Seconds that all probes together may take. Most of it is for imports, which can be slow on a network file system."""

RUN = """
import json, os, signal, sys
import torch  # once for all probes, since it takes longest

def tell(name, said):
    os.write(1, f"\\n{json.dumps([name, said])}\\n".encode())  # one write, so that lines do not mix

def run(name, code):
    said = {}
    try:
        exec(code, {"said": said})
    except Exception as error:
        said["error"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    tell(name, said)

children = {}
for name, code in json.loads(sys.argv[1]).items():
    if sys.platform != "linux":
        run(name, code)
        continue
    child = os.fork()
    if child == 0:
        run(name, code)
        os._exit(0)
    children[child] = name
for child, name in children.items():
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        tell(name, {"error": f"ended by {signal.Signals(os.WTERMSIG(status)).name}"})
"""
"""Runs each probe, on Linux in its own process, and writes what it has put into `said` as one line of JSON."""

GLOO = """
import os, socket, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
# Two ranks, because a single one does not connect.
size = 2 if sys.platform == "linux" else 1
child = os.fork() if size > 1 else None
rank = 1 if child == 0 else 0
start = time.monotonic()
try:
    limit = timedelta(seconds=10)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
finally:
    if child == 0:
        os._exit(0)
    if child:
        os.kill(child, 9)
        os.waitpid(child, 0)
said.update(ranks=int(total), seconds=time.monotonic() - start)
try:
    said["address"] = socket.gethostbyname(socket.gethostname())
    with socket.socket() as own:
        own.bind((said["address"], 0))
except OSError:
    said["address"] = None  # gloo then falls back to loopback
"""
"""Two ranks meet over gloo and sum their ones."""

DEEPSPEED = """
import os
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

said["version"] = deepspeed.__version__
"""

ADAM8BIT = """
import torch
import bitsandbytes

said["version"] = bitsandbytes.__version__
device = "cuda" if torch.cuda.is_available() else "cpu"
said["device"] = device
weights = torch.nn.Parameter(torch.ones(8192, device=device))  # smaller tensors keep 32 bits
weights.grad = torch.ones_like(weights)
bitsandbytes.optim.Adam8bit([weights], lr=0.5).step()
said["moved"] = weights.mean().item() < 0.9
"""
"""Takes one step of the optimizer of `--optimizer adam8bit`."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a probe."""

    said: Mapping[str, Any] = field(default_factory=dict)
    """What the probe found, up to its failure if it failed."""
    failed: str | None = None
    """Why it failed; None if it succeeded."""


class Probes:
    """Runs probes in parallel in the background, and ends them when the context ends.

    Args:
        codes: The code of each probe, by name; see `RUN`.
        limit_s: Seconds that all together may take, from the first call of `outcome`.
    """

    def __init__(self, codes: Mapping[str, str], limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._answers: dict[str, dict[str, Any]] | None = None
        self._silence = "it ended without an error message"
        self._process = self._start([sys.executable, "-c", RUN, json.dumps(dict(codes))])

    def _start(self, command: list[str]) -> subprocess.Popen[str] | None:
        # Otherwise Python would import a file in the current folder that has the name of a module.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        try:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # so that its forks can be ended together with it
            )
        except OSError as error:  # no memory or too many processes: the other checks must still run
            self._silence = describe_error(error)
            return None

    def __enter__(self) -> Probes:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._end(self._process)

    def outcome(self, name: str) -> Outcome:
        """Wait for all probes and return the outcome of one."""
        if self._answers is None:
            self._answers = self._wait()
        said = dict(self._answers.get(name, {"error": self._silence}))
        return Outcome(said, said.pop("error", None))

    def _wait(self) -> dict[str, dict[str, Any]]:
        if self._process is None:
            return {}
        try:
            out, errors = self._process.communicate(timeout=self._limit_s)
            self._silence = (errors.strip().splitlines() or [self._silence])[-1]
        except subprocess.TimeoutExpired:
            out = self._end(self._process)
            self._silence = f"no answer within {self._limit_s:g} s"
        # Other lines are printed by libraries when they are imported.
        return dict(json.loads(line) for line in out.splitlines() if line.startswith('["'))

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> str:
        with suppress(OSError):  # the process has already ended
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        return process.communicate()[0]
