"""Tests ranks on one GPU: one rank with NCCL, two with gloo, each compared with an undisturbed run.

    python benchmarks/gpu_ranks.py                     on the CUDA device
    python benchmarks/gpu_ranks.py --cpu               the same drills on the CPU with gloo, to test this script

One rank with NCCL, under each placement: a run with `--eval-every`, and the same run, stopped by SIGUSR1 between its
steps and resumed, which must report the same numbers. Under zero3 also with `--shard-lm`, and with everything
offloaded. Two ranks on one GPU use gloo, since NCCL does not allow that. Their tensors are on the GPU, and their
numbers must be those of one process.

Prints one row per drill, writes JSON with --out, and exits with code 1 if a drill failed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import torch
import typer
from common import HERE, OFFLINE, hardware, versions
from rich.console import Console
from rich.table import Table

from saekit.runs.metrics import EVALUATION, read_metrics

STEPS, GLOBAL_BATCH, CTX_LEN = 40, 8, 64
PATIENCE = 180
"""The time limit of a run, in seconds."""
SAME = 1e-3
"""The largest relative difference of FVUs that the order of float32 sums may cause over these steps."""
GLOO_RANK = (
    "import accelerate.utils as utils; "
    "kwargs = utils.InitProcessGroupKwargs; "
    "utils.InitProcessGroupKwargs = lambda **given: kwargs(**{**given, 'backend': 'gloo'}); "
    "from saekit.cli import main; main()"
)
"""The code of a rank that uses gloo although it has a GPU."""
console = Console()


class DrillError(Exception):
    """Raised if a drill fails; the message says how."""


class Bench:
    """Makes a model and data, and starts runs on them."""

    def __init__(self, folder: Path, cpu: bool) -> None:
        from datasets import Dataset
        from transformers import GPT2Config, GPT2LMHeadModel

        self.folder, self.cpu = folder, cpu
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=512, n_positions=CTX_LEN, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(folder / "model")
        rows = torch.randint(0, 512, (STEPS * GLOBAL_BATCH + 40, CTX_LEN)).tolist()
        Dataset.from_dict({"input_ids": rows[:-40]}).save_to_disk(folder / "data")
        Dataset.from_dict({"input_ids": rows[-40:]}).save_to_disk(folder / "held_out")

    def command(self, name: str, ranks: int, *options: object) -> list[str]:
        """Return the words of `train ...`, with the same global batch for any number of ranks."""
        sizes = ["--ctx-len", CTX_LEN, "--batch-size", GLOBAL_BATCH // ranks, "--num-latents", 512, "--k", 8]
        exact = ["--dtype", "float32", "--select-dtype", "fp32", "--lr", 1e-3, "--log-every", 1, "--save-every", 10]
        place = ["--save-dir", self.folder, "--run-name", name]
        data = ["train", self.folder / "model", self.folder / "data"]
        return [str(part) for part in (*data, *sizes, *exact, *place, *options)]

    def environment(self, **more: object) -> dict[str, str]:
        """Return the environment of every process: plain lines, no network, and no GPU with `--cpu`."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.cpu else {}
        return os.environ | OFFLINE | hidden | {name: str(value) for name, value in ({"CI": "true"} | more).items()}

    def start(self, launcher: list[object], command: list[str], **more: object) -> subprocess.Popen[str]:
        """Start a process with stdout and stderr in one pipe."""
        whole = [sys.executable, *map(str, launcher), *command]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            whole, env=self.environment(**more), stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=self.folder
        )

    def run(self, *processes: subprocess.Popen[str]) -> None:
        """Wait for all processes, and raise an error if one failed."""
        said = [each.communicate(timeout=PATIENCE)[0] for each in processes]
        codes = [each.returncode for each in processes]
        if any(codes):
            raise DrillError(f"exit codes {codes}: {said[0].strip()[-1500:]}")

    def fvus(self, name: str) -> list[list[float]]:
        """Return the FVU of each layer in each report of a run."""
        steps = read_metrics(self.folder / name / "metrics.jsonl")
        if len(steps) != STEPS:
            raise DrillError(f"{name} reported {len(steps)} steps instead of {STEPS}")
        return [[layer["fvu"] for layer in each["layers"].values()] for each in steps]

    def compare(self, name: str, other: str, tolerance: float) -> str:
        """Compare the reports of two runs, and describe the largest relative difference of their FVUs."""
        pairs = zip(*(chain.from_iterable(self.fvus(each)) for each in (name, other)), strict=True)
        difference = max(abs(one - two) / two for one, two in pairs)
        if not difference <= tolerance:
            raise DrillError(f"FVUs of {name} and {other} differ by {difference:.1e}")
        return f"FVUs differ by {difference:.1e}"

    def torchrun(self, name: str, *options: object) -> subprocess.Popen[str]:
        """Start one rank with torchrun, which uses NCCL on a GPU."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1, "-m", "saekit"]
        return self.start(launcher, self.command(name, 1, *options))

    def accelerate(self, name: str, launch_file: str, *options: object) -> subprocess.Popen[str]:
        """Start one rank with accelerate and one of saekit's launch files."""
        file = HERE.parent / "accelerate_configs" / launch_file
        launcher = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", 1]
        launcher += ["--main_process_port", 0, *(["--gpu_ids=-1,-1"] if self.cpu else []), "-m", "saekit"]
        return self.start(launcher, self.command(name, 1, *options))

    def gloo(self, name: str, *options: object) -> list[subprocess.Popen[str]]:
        """Start two ranks with gloo. Each is local rank 0 according to its environment, so both use the first GPU."""
        port, command = random.randint(20_000, 30_000), self.command(name, 2, *options)
        where = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        return [
            self.start(["-c", GLOO_RANK], command, RANK=rank, GROUP_RANK=rank, MASTER_PORT=port, **where)
            for rank in range(2)
        ]


def alone(bench: Bench) -> str:
    """Run one process without a launcher, the reference for the other drills."""
    bench.run(bench.start(["-m", "saekit"], bench.command("alone", 1)))
    return f"FVU {bench.fvus('alone')[-1][-1]:.4f}"


def whole(bench: Bench, placement: str) -> str:
    """Run one rank under a placement, with evaluations."""
    name = f"whole-{placement}"
    options = ["--eval-every", 20, "--eval-dataset", bench.folder / "held_out", "--eval-tokens", 40 * CTX_LEN]
    bench.run(bench.torchrun(name, "--placement", placement, *options))
    evaluations = len(read_metrics(bench.folder / name / "metrics.jsonl", EVALUATION))
    if evaluations != STEPS // 20:
        raise DrillError(f"{evaluations} evaluations in metrics.jsonl instead of {STEPS // 20}")
    return bench.compare(name, "alone", SAME)


def stopped(bench: Bench, placement: str) -> str:
    """Stop a run with SIGUSR1 between its steps, resume it, and check that it reports the same numbers."""
    name, options = f"stopped-{placement}", ["--placement", placement]
    running = bench.torchrun(name, *options)
    metrics, until = bench.folder / name / "metrics.jsonl", time.monotonic() + PATIENCE
    while not metrics.exists() or metrics.read_text("utf-8").count("\n") < 5:
        if running.poll() is not None or time.monotonic() > until:
            raise DrillError(f"no five steps: {running.communicate()[0][-1500:]}")
        time.sleep(0.02)
    (rank,) = ranks_of(running.pid)
    os.kill(rank, signal.SIGUSR1)  # to the rank, as a scheduler does; torchrun would pass it on, or end
    running.communicate(timeout=PATIENCE)
    step = json.loads((bench.folder / name / "latest" / "checkpoint.json").read_text("utf-8"))["step"]
    if not 5 <= step < STEPS:
        raise DrillError(f"it stopped at step {step}")
    bench.run(bench.torchrun(name, *options, "--resume", "auto"))
    return f"stopped at {step}, {bench.compare(name, f'whole-{placement}', 1e-6)}"


def ranks_of(pid: int) -> list[int]:
    """Return the processes that a launcher has started and that run saekit."""
    return [each.pid for each in psutil.Process(pid).children() if "saekit" in " ".join(each.cmdline())]


def sharded(bench: Bench) -> str:
    """Run with a sharded language model."""
    bench.run(bench.torchrun("sharded", "--placement", "zero3", "--shard-lm"))
    return bench.compare("sharded", "alone", SAME)


def offloaded(bench: Bench) -> str:
    """Run with parameters and optimizer states in the machine's memory."""
    bench.run(bench.accelerate("offloaded", "zero3_offload.yaml"))
    return bench.compare("offloaded", "alone", SAME)


def two(bench: Bench, placement: str) -> str:
    """Run two ranks with gloo on one device."""
    name = f"two-{placement}"
    bench.run(*bench.gloo(name, "--placement", placement))
    return bench.compare(name, "alone", SAME)


def drills() -> Iterator[tuple[str, Callable[[Bench], str]]]:
    """Yield the name and the function of each drill. Runs that others are compared with come first."""
    yield "alone", alone
    for placement in ("ddp", "layer-map", "zero3"):
        yield f"one rank, {placement}", lambda bench, name=placement: whole(bench, name)
        yield f"USR1 and resume, {placement}", lambda bench, name=placement: stopped(bench, name)
    yield "one rank, zero3, sharded language model", sharded
    yield "one rank, zero3, offloaded", offloaded
    for placement in ("ddp", "layer-map", "zero3"):
        yield f"two ranks, gloo, {placement}", lambda bench, name=placement: two(bench, name)


class Outcome(NamedTuple):
    """The outcome of a drill."""

    ok: bool
    said: str
    seconds: float


def tried(drill: Callable[[Bench], str], bench: Bench) -> Outcome:
    """Run a drill and return its outcome. An error in it is an outcome, too."""
    began = time.perf_counter()
    try:
        ok, said = True, drill(bench)
    except (DrillError, subprocess.TimeoutExpired, OSError, KeyError, ValueError) as error:
        ok, said = False, f"{type(error).__name__}: {error}"
    return Outcome(ok, said, time.perf_counter() - began)


def main(
    cpu: Annotated[bool, typer.Option("--cpu", help="Run on the CPU, with gloo everywhere.")] = False,
    only: Annotated[str, typer.Option(help="Run drills whose names contain this; `alone` always runs.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Run all drills and print their outcomes."""
    if not cpu and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device: use --cpu")
    found: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), cpu)
        for name, drill in drills():
            if name == "alone" or only in name:
                found[name] = tried(drill, bench)
                console.print(f"{name}: {found[name].said}", markup=False, highlight=False)
    table = Table("drill", "", "seconds", "outcome")
    for name, each in found.items():
        last = each.said.splitlines()[-1] if each.said else ""
        table.add_row(name, "ok" if each.ok else "[red]FAILED[/red]", f"{each.seconds:.0f}", last[-100:])
    console.print(table)
    if out is not None:
        record = {"date": date.today().isoformat(), "hardware": hardware(), "versions": versions(sys.executable)}
        record |= {} if cpu else {"gpu": torch.cuda.get_device_name()}
        record["drills"] = {name: each._asdict() for name, each in found.items()}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not all(each.ok for each in found.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
