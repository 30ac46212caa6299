"""Tests runs on two simulated machines: two network namespaces, each with its own host name and its own caches.

    python benchmarks/two_nodes.py runs       # under each placement: train, SIGTERM, resume to the end
    python benchmarks/two_nodes.py slurm      # the same with examples/slurm_multi_node.sh, as sbatch would run it
    python benchmarks/two_nodes.py failures   # 20 times: a rank raises while others block all signal handlers

Needs root, `ip` and `unshare`. The ranks use gloo over a virtual cable, the only link between the namespaces. Results
are printed and written to benchmarks/results/two_nodes.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "two_nodes.json"
PLACEMENTS = ("ddp", "layer-map", "zero3")
NODES = ("saekit-node0", "saekit-node1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LIMIT = 30.0
"""The number of seconds within which all ranks must end after one has raised an error."""
SIZES = ["--num-latents", "64", "--k", "4", "--ctx-len", "16", "--batch-size", "2", "--log-every", "1"]
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree"]
ENTER = """#!/bin/bash
# enter NODE COMMAND...: run a command on one of the machines.
node=$1; shift
export HF_HOME={work}/cache$node HF_DATASETS_CACHE={work}/cache$node/datasets XDG_CACHE_HOME={work}/cache$node
export GLOO_SOCKET_IFNAME=eth0
exec ip netns exec saekit-node$node unshare --uts bash -c \
    'hostname "$0" && mount --bind {work}/hosts /etc/hosts && exec "$@"' "node$node" "$@"
"""
HOSTS = f"127.0.0.1 localhost\n{ADDRESSES[0]} node0\n{ADDRESSES[1]} node1\n"
SRUN = """#!/bin/bash
# Starts one task on each machine. Since SLURM 22.05, a task gets one CPU, or as many as SRUN_CPUS_PER_TASK says. A task
# that fails ends the others only with --kill-on-bad-exit.
options=" "
while [[ $1 == --* ]]; do options+="$1 "; shift; done
export SLURM_CPUS_PER_TASK=${{SRUN_CPUS_PER_TASK:-1}} SLURM_NTASKS=2 SLURM_LOCALID=0
for node in 0 1; do
    SLURM_PROCID=$node SLURM_NODEID=$node {work}/enter $node "$@" & echo $! > {work}/task$node
done
tasks=$(jobs -p)
if ! {{ wait -n && wait -n; }}; then
    [[ $options == *" --kill-on-bad-exit=1 "* ]] && kill $tasks 2> /dev/null
    wait
    exit 1
fi
"""
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames node[0-1]" ]] && printf 'node0\\nnode1\\n'
"""


@contextmanager
def two_nodes(work: Path) -> Iterator[None]:
    """Make the namespaces and the cable between them, and remove them at the end."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    for node in NODES:
        ip("netns", "add", node)  # fails if another drill uses or has left them: run `ip netns delete` in that case
    try:
        ip("link", "add", "saekit0", "type", "veth", "peer", "name", "saekit1")
        for number, (node, address) in enumerate(zip(NODES, ADDRESSES, strict=True)):
            ip("link", "set", f"saekit{number}", "netns", node, "name", "eth0")
            ip("-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", node, "link", "set", link, "up")
        (work / "hosts").write_text(HOSTS)
        for name, text in (("enter", ENTER), ("srun", SRUN), ("scontrol", SCONTROL)):
            (work / name).write_text(text.format(work=work))
            (work / name).chmod(0o755)
        yield
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "delete", node], check=False, stderr=subprocess.DEVNULL)


def environment() -> dict[str, str]:
    """Return the environment of the launchers: one thread per rank, plain lines, this source tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PET_", "TORCHELASTIC"))}
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CI": "true", "PYTHONPATH": str(ROOT)}
    return {**kept, **more, "HF_HUB_OFFLINE": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "140"}


class Job:
    """A run on both machines with two ranks each, started by torchrun.

    Args:
        work: The folder for logs and for the run.
        placement: The placement of the SAEs.
        options: Additional options of `saekit train`.
        variables: Additional environment variables.
    """

    def __init__(self, work: Path, placement: str, options: list[str], variables: dict[str, str]) -> None:
        from saekit.demo import MODEL_DIR

        self.work, self.logs = work, list[Path]()
        self.launchers: list[subprocess.Popen[bytes]] = []
        train = [str(MODEL_DIR), str(work / "text.jsonl"), *SIZES, "--save-dir", str(work), "--run-name", "run"]
        self.start([*train, "--placement", placement, *options], variables)

    def start(self, train: list[str], variables: dict[str, str]) -> None:
        """Start a launcher on each machine."""
        port = str(random.randint(10_000, 32_000))
        for number in (0, 1):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
            launcher += ["--node_rank", str(number), "--master_addr", ADDRESSES[0], "--master_port", port]
            command = [str(self.work / "enter"), str(number), *launcher, "-m", "saekit", "train", *train]
            self.launch(command, self.work / f"node{number}.log", {**environment(), **variables}, self.work)

    def launch(self, command: list[str], log: Path, variables: dict[str, str], folder: Path) -> None:
        """Start a process with these environment variables in a folder, and write its stderr to the log."""
        with log.open("w") as file:
            self.launchers.append(subprocess.Popen(command, env=variables, stderr=file, cwd=folder))
        self.logs.append(log)

    def signal(self, number: int) -> None:
        """Send a signal to the launcher of each machine, as a scheduler does."""
        for each in self.launchers:
            each.send_signal(number)

    def wait(self, seconds: float) -> list[int]:
        """Wait for the launchers, kill those that still run after this number of seconds, and return all exit codes."""
        until = time.monotonic() + seconds
        for each in self.launchers:
            try:
                each.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
        return [each.returncode for each in self.launchers]

    def kill(self) -> None:
        """Kill all processes that still run."""
        for each in self.launchers:
            if each.poll() is None:
                for process in [*psutil.Process(each.pid).children(recursive=True), each]:
                    process.kill()
                each.wait()

    def said(self) -> str:
        """Return what both machines have written to stderr."""
        return "\n".join(log.read_text(encoding="utf-8") for log in self.logs)


class SlurmJob(Job):
    """A run that the example for SLURM starts, with simulated `srun` and `scontrol`."""

    def start(self, train: list[str], variables: dict[str, str]) -> None:
        """Run the script on the first machine, as sbatch does."""
        # The example's launch files are for GPUs. The ranks find no GPU and use gloo.
        config = "zero3" if train[train.index("--placement") + 1] == "zero3" else "multi_node"
        told = {"SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2"}
        told |= {"SLURM_CPUS_PER_TASK": "2", "GPUS_PER_NODE": "2", "CONFIG": f"accelerate_configs/{config}.yaml"}
        told |= {"PATH": f"{self.work}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        kept = {name: value for name, value in environment().items() if name != "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
        command = [str(self.work / "enter"), "0", "bash", str(ROOT / "examples" / "slurm_multi_node.sh"), *train]
        self.launch(command, self.work / "job.log", kept | told | variables, ROOT)

    def signal(self, number: int) -> None:
        """Send a signal to the tasks that srun has started, as SLURM does."""
        for task in (0, 1):
            os.kill(int((self.work / f"task{task}").read_text()), number)


def wait_until(happened: Callable[[], Any], job: Job, seconds: float = 120) -> None:
    """Wait until something has happened, and fail if it takes too long or the job ends first."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, job.said()
        assert any(each.poll() is None for each in job.launchers), job.said()
        time.sleep(0.1)


def stop_and_resume(work: Path, placement: str, kind: type[Job]) -> dict[str, Any]:
    """Train, send SIGTERM, resume to the end, and return the results."""
    from saekit.runs.recovery import read_index

    options = ["--max-tokens", str(150 * 8 * 16), "--resume", "auto"]
    job = kind(work, placement, options, {})
    try:
        wait_until(lambda: re.search(r"^step \d", job.said(), re.M), job)
        sent = time.monotonic()
        job.signal(signal.SIGTERM)
        job.wait(LIMIT)
        seconds = time.monotonic() - sent
        assert job.said().count("Stopped after step ") == 1, job.said()
        stopped_at = read_index(work / "run" / "latest")["step"]
        assert 1 <= stopped_at < 150, stopped_at
        job = kind(work, placement, options, {})
        codes = job.wait(240)
        assert not any(codes), f"{codes}: {job.said()}"
        assert job.said().count("Resuming from ") == 1, job.said()
        assert read_index(work / "run" / "latest")["step"] == 150
    finally:
        job.kill()
    return {"stopped_at": stopped_at, "seconds_to_stop": round(seconds, 1), "codes_at_the_end": codes}


def fail_once(work: Path, placement: str, fails: int, stuck: list[int]) -> dict[str, Any]:
    """Let one rank raise an error while others are stuck, and return how the run ends."""
    (work / "raised").unlink(missing_ok=True)
    options = ["--plugin", str(HERE / "failing_source.py"), "--source", "failing", "--overwrite"]
    told = {"FAILS": str(fails), "STUCK": " ".join(map(str, stuck)), "NOTES": str(work)}
    job = Job(work, placement, options, told)
    try:
        wait_until((work / "raised").exists, job)
        pids = [int((work / f"pid{rank}").read_text()) for rank in range(4)]
        raised = float((work / "raised").read_text() or time.time())
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), job, seconds=90)
        ranks_ended = time.time() - raised
        codes = job.wait(LIMIT)
        all_ended = time.time() - raised
    finally:
        job.kill()
    messages = [line for line in job.said().splitlines() if line.startswith("Error: ")]
    good = all_ended < LIMIT and all(codes) and messages == [f"Error: rank {fails} has failed"]
    found = {"placement": placement, "fails": fails, "stuck": stuck, "ranks_ended": round(ranks_ended, 1)}
    found |= {"all_ended": round(all_ended, 1), "codes": codes, "messages": messages, "good": good}
    if not good:
        sys.stderr.write(job.said())
    return found


def write(key: str, found: Any) -> None:
    """Print results, and add them to the file of results."""
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if isinstance(found, list):
        record[key] = [*record.get(key, []), *found]
    else:
        record[key] = {**record.get(key, {}), **found}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{key}: {found}\n")
    sys.stdout.flush()


def main() -> int:
    """Run one of the drills. The exit code is 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=["runs", "slurm", "failures"])
    parser.add_argument("--times", type=int, default=20, help="failures in a row")
    parser.add_argument("--first", type=int, default=0, help="number of the first, to continue an earlier drill")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that machines and launchers are cleaned up
    good = True
    with tempfile.TemporaryDirectory() as folder, two_nodes(Path(folder)):
        work = Path(folder)
        texts = (" ".join(random.choices(WORDS, k=30)) for _ in range(3000))
        (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        if asked.drill == "failures":
            for number in range(asked.first, asked.times):
                # Cycle through ranks and placements. None to all of the other ranks are stuck; the rest wait normally.
                fails, placement = number % 4, asked.placements[number % len(asked.placements)]
                others = [rank for rank in range(4) if rank != fails]
                found = fail_once(work, placement, fails, others[: number % 5])
                write("failures", [found])
                good = good and found["good"]
            return 0 if good else 1
        for placement in asked.placements:
            shutil.rmtree(work / "run", ignore_errors=True)
            kind = SlurmJob if asked.drill == "slurm" else Job
            write(asked.drill, {placement: stop_and_resume(work, placement, kind)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
