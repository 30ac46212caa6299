"""examples/slurm_multi_node.sh, with two launchers of this machine in place of SLURM's machines."""

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest

import saekit
from saekit.runs.recovery import read_index
from tests.forked import free_port, processes_of
from tests.placement.conftest import CTX_LEN, DEMO_LM, GLOBAL_BATCH, STEPS

ROOT = Path(saekit.__file__).parent.parent
SRUN = """#!/bin/bash
# One task per machine. As since 22.05, its CPUs are one, or those of SRUN_CPUS_PER_TASK. A task that fails ends the
# others only if that is asked for.
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
export SLURM_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-1}
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
if ! { wait -n && wait -n; }; then
    [[ " ${options[*]} " == *" --kill-on-bad-exit=1 "* ]] && kill $first $second 2> /dev/null
    wait
    exit 1
fi
"""
SCONTROL = """#!/bin/bash
echo 127.0.0.1; sleep 0.2; echo 127.0.0.2
"""
"""Says the names of many machines in several parts: who stops to listen after the first would end it by SIGPIPE."""
ACCELERATE = """#!/bin/bash
[[ $FAILS == "$SLURM_PROCID" ]] && exit 7
[[ -n $FAILS ]] && exec sleep 50
echo "machine=$SLURM_PROCID cpus=$SLURM_CPUS_PER_TASK threads=$OMP_NUM_THREADS $*" >> "$SAID"
"""
"""Says what it was started with; or fails, or waits for the other one, which has."""


def many_tokens(tmp_path):
    """Enough for thousands of steps."""
    file = tmp_path / "many.bin"
    np.random.default_rng(0).integers(5, 2000, 60_000 * CTX_LEN, dtype=np.uint16).tofile(file)
    return file


@pytest.fixture
def sbatch(tmp_path, token_dir, forked):
    """Start the script as SLURM would; `file` is the launch file."""
    tools = {"scontrol": SCONTROL, "srun": SRUN}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(file, *options, data=token_dir, **variables):
        environment = {
            **forked.environment(),
            "PATH": f"{tmp_path}:{forked.commands}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_NODELIST": "two",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_JOB_ID": str(22_000 * 1_000 + free_port() - 10_000),
            "GPUS_PER_NODE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "CI": "true",
            "CONFIG": str(ROOT / "accelerate_configs" / f"{file}.yaml"),
            **variables,
        }
        sizes = ["--num-latents", "64", "--k", "4", "--ctx-len", str(CTX_LEN), "--batch-size", str(GLOBAL_BATCH // 2)]
        place = ["--save-dir", str(tmp_path), "--run-name", "run"]
        command = ["bash", str(ROOT / "examples" / "slurm_multi_node.sh"), str(DEMO_LM), str(data)]
        return subprocess.Popen(
            [*command, *sizes, *place, *options], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.parametrize(("per_node", "cpus", "threads"), [(8, 32, 4), (8, 4, 1)])
def test_each_machine_gets_one_launcher_with_its_cpus_and_the_jobs_port(tmp_path, sbatch, per_node, cpus, threads):
    (tmp_path / "accelerate").write_text(ACCELERATE)
    (tmp_path / "accelerate").chmod(0o755)
    job = {"SLURM_JOB_ID": "4194345", "GPUS_PER_NODE": str(per_node), "SLURM_CPUS_PER_TASK": str(cpus)}
    running = sbatch("multi_node", SAID=str(tmp_path / "said"), **job)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 0, errors
    lines = sorted((tmp_path / "said").read_text().splitlines())
    assert [line.split(" ")[:3] for line in lines] == [
        [f"machine={rank}", f"cpus={cpus}", f"threads={threads}"] for rank in (0, 1)
    ]
    for rank, line in enumerate(lines):
        assert f" --machine_rank {rank} --main_process_ip 127.0.0.1 --main_process_port 24345 " in line
        assert f" --num_machines 2 --num_processes {2 * per_node} " in line


def test_a_launcher_that_fails_ends_the_one_on_the_other_machine(tmp_path, sbatch):
    (tmp_path / "accelerate").write_text(ACCELERATE)
    (tmp_path / "accelerate").chmod(0o755)
    running = sbatch("multi_node", FAILS="1")
    running.communicate(timeout=30)
    assert running.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "options"),
    [("multi_node", ["--placement", "layer-map"]), ("zero3", [])],  # ddp: the next test
)
def test_two_launchers_make_one_run(tmp_path, sbatch, file, options):
    job = sbatch(file, *options)
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    placement = "zero3" if file == "zero3" else options[-1] if options else "ddp"
    assert errors.count(f", {placement} on 2 ranks") == 1, errors
    assert read_index(tmp_path / "run" / "latest")["step"] == STEPS


@pytest.mark.slow
def test_a_job_that_is_signalled_saves_and_the_next_one_goes_on(tmp_path, sbatch):
    """SLURM's signal reaches the processes that srun started, which are the launchers."""
    job = sbatch("multi_node", "--save-every", "100000", data=many_tokens(tmp_path))
    for line in job.stderr:
        if line.startswith("step "):
            break
    launchers = [each for each in psutil.Process(job.pid).children(recursive=True) if "launch" in each.cmdline()]
    assert len(launchers) == 2
    for launcher in launchers:
        launcher.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=100)
    assert "Stopped after step " in errors
    stopped_at = read_index(tmp_path / "run" / "latest")["step"]

    job = sbatch("multi_node", "--log-every", "2", data=many_tokens(tmp_path))
    assert any(line.startswith("Resuming from ") for line in job.stderr)
    for line in job.stderr:
        if line.startswith("step "):
            assert int(line.split()[1].split("/")[0].replace(",", "")) > stopped_at
            break
    for process in processes_of(tmp_path):
        process.kill()
    job.communicate(timeout=60)
