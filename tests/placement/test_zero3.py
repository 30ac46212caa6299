"""What only sharding promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import environment
from tests.placement.conftest import DEMO_LM

pytestmark = pytest.mark.slow
COUNTED = Path(__file__).with_name("counted.py")


def torchrun(*command, ranks=2, **variables):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    parts = [str(part) for part in (*launcher, *command)]
    return subprocess.run(
        parts, env=environment() | variables, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.fixture(scope="module")
def counts(tmp_path_factory, forked):
    """What two ranks count in three steps of six layers."""
    folder = tmp_path_factory.mktemp("counted")
    said = folder / "stderr"
    assert forked.run([folder], 2, said, folder, timeout=200, script=COUNTED) == [0, 0], said.read_text()
    return json.loads((folder / "counts.json").read_text())


def test_no_more_than_one_layer_is_whole_at_a_time(counts):
    assert counts["forwards"] == 3 * 6
    assert counts["whole"] == {"forward": 1, "backward": 1, "between": 0}


def test_the_host_waits_nowhere_for_the_device_but_for_the_message(counts):
    """On a GPU each wait leaves it without work; what DeepSpeed would all-reduce to clip gradients, nobody reads."""
    assert counts["calls"] == {}


def test_a_sharded_language_model_says_what_the_whole_one_does(gpt2_dir):
    result = torchrun("-m", "tests.placement.sharded_lm", gpt2_dir)
    assert result.returncode == 0, result.stderr
    share, furthest = next(line for line in result.stdout.splitlines() if "SHARE" in line).split()[1:]
    assert float(share) == 0.5
    assert float(furthest) == 0


@pytest.mark.parametrize("placement", ["ddp", "layer-map"])
def test_nobody_else_shards_the_language_model(tmp_path, token_dir, placement):
    options = ["--num-latents", 64, "--k", 4, "--ctx-len", 16, "--save-dir", tmp_path, "--batch-size", 2]
    named = ["--placement", placement] if placement == "layer-map" else []  # ddp is what torchrun alone means
    result = torchrun("-m", "saekit", "train", DEMO_LM, token_dir, *named, "--shard-lm", *options)
    assert result.returncode != 0
    assert result.stderr.count("Error: --shard-lm") == 1, result.stderr
    assert placement in result.stderr


def test_an_optimizer_that_needs_whole_matrices_is_refused(tmp_path, token_dir):
    options = ["--num-latents", 64, "--k", 4, "--ctx-len", 16, "--save-dir", tmp_path, "--batch-size", 2]
    result = torchrun(
        "-m", "saekit", "train", DEMO_LM, token_dir, "--placement", "zero3", "--optimizer", "muon", *options
    )
    assert result.returncode != 0
    assert result.stderr.count("zero3 cannot train with --optimizer muon") == 1, result.stderr
