"""examples/slurm_multi_node.sh, with two launchers of this machine in the place of SLURM's machines."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import saekit
from saekit.training.recovery import read_index
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


@pytest.mark.parametrize(
    ("file", "options"), [("multi_node", []), ("multi_node", ["--placement", "layer-map"]), ("zero3", [])]
)
def test_two_launchers_make_one_run(tmp_path, token_dir, file, options):
    tools = {"scontrol": "#!/bin/bash\necho 127.0.0.1\n", "srun": SRUN}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
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
    command = ["bash", str(ROOT / "examples" / "slurm_multi_node.sh"), str(DEMO_LM), str(token_dir)]
    result = subprocess.run(
        [*command, *sizes, *place, *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    placement = "zero3" if file == "zero3" else options[-1] if options else "ddp"
    assert result.stderr.count(f", {placement} on 2 ranks") == 1, result.stderr
    assert read_index(tmp_path / "run" / "latest")["step"] == 20
