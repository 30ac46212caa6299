"""examples/slurm_multi_node.sh, with two launchers of this machine in the place of SLURM's machines."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

import saekit
from saekit.runs.recovery import read_index
from tests.placement.conftest import CTX_LEN, DEMO_LM, GLOBAL_BATCH

pytestmark = pytest.mark.slow
ROOT = Path(saekit.__file__).parent.parent
SRUN = """#!/bin/bash
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
wait $first && wait $second
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def many_tokens(tmp_path):
    """Enough for thousands of steps."""
    file = tmp_path / "many.bin"
    np.random.default_rng(0).integers(5, 2000, 60_000 * CTX_LEN, dtype=np.uint16).tofile(file)
    return file


@pytest.fixture
def sbatch(tmp_path, token_dir):
    """Start the script as SLURM would; `file` is the launch file."""
    tools = {"scontrol": "#!/bin/bash\necho 127.0.0.1\n", "srun": SRUN}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(file, *options, data=token_dir):
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "SLURM_JOB_NODELIST": "two",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "GPUS_PER_NODE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "CI": "true",
            "PORT": str(free_port()),
            "CONFIG": str(ROOT / "accelerate_configs" / f"{file}.yaml"),
        }
        sizes = ["--num-latents", "64", "--k", "4", "--ctx-len", str(CTX_LEN), "--batch-size", str(GLOBAL_BATCH // 2)]
        place = ["--save-dir", str(tmp_path), "--run-name", "run"]
        command = ["bash", str(ROOT / "examples" / "slurm_multi_node.sh"), str(DEMO_LM), str(data)]
        return subprocess.Popen(
            [*command, *sizes, *place, *options], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.parametrize(
    ("file", "options"), [("multi_node", []), ("multi_node", ["--placement", "layer-map"]), ("zero3", [])]
)
def test_two_launchers_make_one_run(tmp_path, sbatch, file, options):
    job = sbatch(file, *options)
    _, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    placement = "zero3" if file == "zero3" else options[-1] if options else "ddp"
    assert errors.count(f", {placement} on 2 ranks") == 1, errors
    assert read_index(tmp_path / "run" / "latest")["step"] == 20


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
    assert any(line.startswith("Going on from ") for line in job.stderr)
    for line in job.stderr:
        if line.startswith("step "):
            assert int(line.split()[1].split("/")[0].replace(",", "")) > stopped_at
            break
    for process in psutil.Process(job.pid).children(recursive=True):
        process.kill()
    job.communicate(timeout=60)
