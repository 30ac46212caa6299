"""Runs over ranks on one GPU: NCCL with one rank, gloo with two, each against a run that nothing disturbs.

    python benchmarks/gpu_ranks.py                     on the CUDA device
    python benchmarks/gpu_ranks.py --cpu               the same drills with gloo, to see that they work

One rank with NCCL, under each placement: a run with `--eval-every`; the same run, ended by SIGUSR1 amid its steps and
resumed, must report the same numbers. Under zero3 also with `--shard-lm` and with everything offloaded. Two ranks on
the one GPU speak gloo, since NCCL refuses that: their tensors are CUDA's, and their numbers those of one process.

Prints a row per drill, writes JSON with --out, and ends with code 1 where one failed.
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
"""Seconds that a run may take."""
SAME = 1e-3
"""Relative difference of FVUs that the order of summation may make over these steps, in float32."""
GLOO_RANK = (
    "import accelerate.utils as utils; "
    "kwargs = utils.InitProcessGroupKwargs; "
    "utils.InitProcessGroupKwargs = lambda **given: kwargs(**{**given, 'backend': 'gloo'}); "
    "from saekit.cli import main; main()"
)
"""A rank that speaks gloo, although it has a GPU."""
console = Console()


class DrillError(Exception):
    """A drill did not go as it should; says how."""


class Bench:
    """The model, the data, and how runs are started."""

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
        """`train ...`: the same global batch on any number of ranks."""
        sizes = ["--ctx-len", CTX_LEN, "--batch-size", GLOBAL_BATCH // ranks, "--num-latents", 512, "--k", 8]
        exact = ["--dtype", "float32", "--select-dtype", "fp32", "--lr", 1e-3, "--log-every", 1, "--save-every", 10]
        place = ["--save-dir", self.folder, "--run-name", name]
        data = ["train", self.folder / "model", self.folder / "data"]
        return [str(part) for part in (*data, *sizes, *exact, *place, *options)]

    def environment(self, **more: object) -> dict[str, str]:
        """Of every process: plain lines, no network, and no GPU where there is to be none."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.cpu else {}
        return os.environ | OFFLINE | hidden | {name: str(value) for name, value in ({"CI": "true"} | more).items()}

    def start(self, launcher: list[object], command: list[str], **more: object) -> subprocess.Popen[str]:
        """Start a process whose output is kept in one piece."""
        whole = [sys.executable, *map(str, launcher), *command]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            whole, env=self.environment(**more), stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=self.folder
        )

    def run(self, *processes: subprocess.Popen[str]) -> None:
        """Wait for the end of all."""
        said = [each.communicate(timeout=PATIENCE)[0] for each in processes]
        codes = [each.returncode for each in processes]
        if any(codes):
            raise DrillError(f"exit codes {codes}: {said[0].strip()[-1500:]}")

    def fvus(self, name: str) -> list[list[float]]:
        """FVU of each layer in each report of a run."""
        steps = read_metrics(self.folder / name / "metrics.jsonl")
        if len(steps) != STEPS:
            raise DrillError(f"{name} reported {len(steps)} steps instead of {STEPS}")
        return [[layer["fvu"] for layer in each["layers"].values()] for each in steps]

    def compare(self, name: str, other: str, tolerance: float) -> str:
        """Hold the reports of one run to those of another; the largest relative difference."""
        pairs = zip(*(chain.from_iterable(self.fvus(each)) for each in (name, other)), strict=True)
        difference = max(abs(one - two) / two for one, two in pairs)
        if not difference <= tolerance:
            raise DrillError(f"FVUs of {name} and {other} differ by {difference:.1e}")
        return f"FVUs differ by {difference:.1e}"

    def torchrun(self, name: str, *options: object) -> subprocess.Popen[str]:
        """One rank, started by torchrun: with NCCL where there is a GPU."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1, "-m", "saekit"]
        return self.start(launcher, self.command(name, 1, *options))

    def accelerate(self, name: str, launch_file: str, *options: object) -> subprocess.Popen[str]:
        """One rank, started by accelerate with one of our launch files."""
        file = HERE.parent / "accelerate_configs" / launch_file
        launcher = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", 1]
        launcher += ["--main_process_port", 0, *(["--gpu_ids=-1,-1"] if self.cpu else []), "-m", "saekit"]
        return self.start(launcher, self.command(name, 1, *options))

    def gloo(self, name: str, *options: object) -> list[subprocess.Popen[str]]:
        """Two ranks with gloo, each of which takes itself for the first of a machine, and so takes the first GPU."""
        port, command = random.randint(20_000, 30_000), self.command(name, 2, *options)
        where = {"WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
        return [
            self.start(["-c", GLOO_RANK], command, RANK=rank, GROUP_RANK=rank, MASTER_PORT=port, **where)
            for rank in range(2)
        ]


def alone(bench: Bench) -> str:
    """One process that no launcher started: what the others are held to."""
    bench.run(bench.start(["-m", "saekit"], bench.command("alone", 1)))
    return f"FVU {bench.fvus('alone')[-1][-1]:.4f}"


def whole(bench: Bench, placement: str) -> str:
    """A run under a placement, with evaluations."""
    name = f"whole-{placement}"
    options = ["--eval-every", 20, "--eval-dataset", bench.folder / "held_out", "--eval-tokens", 40 * CTX_LEN]
    bench.run(bench.torchrun(name, "--placement", placement, *options))
    evaluations = len(read_metrics(bench.folder / name / "metrics.jsonl", EVALUATION))
    if evaluations != STEPS // 20:
        raise DrillError(f"{evaluations} evaluations in metrics.jsonl instead of {STEPS // 20}")
    return bench.compare(name, "alone", SAME)


def stopped(bench: Bench, placement: str) -> str:
    """USR1 amid the steps ends it with a checkpoint; it goes on and reports the same numbers."""
    name, options = f"stopped-{placement}", ["--placement", placement]
    running = bench.torchrun(name, *options)
    metrics, until = bench.folder / name / "metrics.jsonl", time.monotonic() + PATIENCE
    while not metrics.exists() or metrics.read_text("utf-8").count("\n") < 5:
        if running.poll() is not None or time.monotonic() > until:
            raise DrillError(f"no five steps: {running.communicate()[0][-1500:]}")
        time.sleep(0.02)
    (rank,) = ranks_of(running.pid)
    os.kill(rank, signal.SIGUSR1)  # as a scheduler signals every process; torchrun itself would pass it on or die
    running.communicate(timeout=PATIENCE)
    step = json.loads((bench.folder / name / "latest" / "checkpoint.json").read_text("utf-8"))["step"]
    if not 5 <= step < STEPS:
        raise DrillError(f"it stopped at step {step}")
    bench.run(bench.torchrun(name, *options, "--resume", "auto"))
    return f"stopped at {step}, {bench.compare(name, f'whole-{placement}', 1e-6)}"


def ranks_of(pid: int) -> list[int]:
    """Processes that a launcher has started and that run saekit."""
    return [each.pid for each in psutil.Process(pid).children() if "saekit" in " ".join(each.cmdline())]


def sharded(bench: Bench) -> str:
    """The language model is sharded, too."""
    bench.run(bench.torchrun("sharded", "--placement", "zero3", "--shard-lm"))
    return bench.compare("sharded", "alone", SAME)


def offloaded(bench: Bench) -> str:
    """Parameters and optimizer states lie in the machine's memory."""
    bench.run(bench.accelerate("offloaded", "zero3_offload.yaml"))
    return bench.compare("offloaded", "alone", SAME)


def two(bench: Bench, placement: str) -> str:
    """Two ranks with gloo on one device."""
    name = f"two-{placement}"
    bench.run(*bench.gloo(name, "--placement", placement))
    return bench.compare(name, "alone", SAME)


def drills() -> Iterator[tuple[str, Callable[[Bench], str]]]:
    """Name and function of each, in an order in which each has what it is compared to."""
    yield "alone", alone
    for placement in ("ddp", "layer-map", "zero3"):
        yield f"one rank, {placement}", lambda bench, name=placement: whole(bench, name)
        yield f"USR1 and resume, {placement}", lambda bench, name=placement: stopped(bench, name)
    yield "one rank, zero3, sharded language model", sharded
    yield "one rank, zero3, offloaded", offloaded
    for placement in ("ddp", "layer-map", "zero3"):
        yield f"two ranks, gloo, {placement}", lambda bench, name=placement: two(bench, name)


class Outcome(NamedTuple):
    """How a drill went."""

    ok: bool
    said: str
    seconds: float


def tried(drill: Callable[[Bench], str], bench: Bench) -> Outcome:
    """Run a drill; what goes wrong in it is an outcome."""
    began = time.perf_counter()
    try:
        ok, said = True, drill(bench)
    except (DrillError, subprocess.TimeoutExpired, OSError, KeyError, ValueError) as error:
        ok, said = False, f"{type(error).__name__}: {error}"
    return Outcome(ok, said, time.perf_counter() - began)


def main(
    cpu: Annotated[bool, typer.Option("--cpu", help="Without the GPU, with gloo everywhere.")] = False,
    only: Annotated[str, typer.Option(help="Drills whose names contain this; `alone` is always run.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    """Run all drills and print what came of each."""
    if not cpu and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device: --cpu runs the drills without one")
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
