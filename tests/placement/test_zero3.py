"""What only sharding promises."""

import json
from pathlib import Path

import pytest

from tests.placement.conftest import DEMO_LM

pytestmark = pytest.mark.slow
COUNTED, SHARDED_LM = (Path(__file__).with_name(name) for name in ("counted.py", "sharded_lm.py"))


@pytest.fixture(scope="module")
def counts(tmp_path_factory, forked):
    """What two ranks count in three steps of six layers, whose middle rows and biases they cut apart."""
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


def test_ranks_tell_each_other_numbers_in_a_step_and_no_objects(counts):
    """An object takes two rounds of messages, the first of which says how large it is."""
    assert counts["objects per step"] == 0


def test_collectives_of_the_engine_may_take_an_hour(counts):
    """DeepSpeed's own groups, too, when no language model is sharded; ranks wait a day for each other elsewhere."""
    assert counts["timeouts"] == [3600, 24 * 3600]


def test_a_checkpoint_holds_what_the_ranks_have(counts):
    """To the bit, padding left out."""
    assert counts["saved"]


def test_a_sharded_language_model_says_what_the_whole_one_does(gpt2_dir, forked, tmp_path):
    said = tmp_path / "stderr"
    assert forked.run([gpt2_dir], 2, said, tmp_path, timeout=200, script=SHARDED_LM) == [0, 0], said.read_text()
    share, furthest = (tmp_path / "found").read_text().split()
    assert float(share) == 0.5
    assert float(furthest) == 0


@pytest.fixture
def refused(forked, tmp_path, token_dir):
    """Try to train on two ranks; what they say."""

    def run(*options):
        sizes = ["--num-latents", 64, "--k", 4, "--ctx-len", 16, "--save-dir", tmp_path, "--batch-size", 2]
        command, said = ["train", DEMO_LM, token_dir, *sizes, *options], tmp_path / "stderr"
        assert all(forked.run(command, 2, said, tmp_path, timeout=200))
        return said.read_text()

    return run


@pytest.mark.parametrize("placement", ["ddp", "layer-map"])
def test_nobody_else_shards_the_language_model(refused, placement):
    named = ["--placement", placement] if placement == "layer-map" else []  # ddp is what a launcher alone means
    said = refused(*named, "--shard-lm")
    assert said.count("Error: --shard-lm") == 1, said
    assert placement in said


def test_an_optimizer_that_needs_whole_matrices_is_refused(refused):
    said = refused("--placement", "zero3", "--optimizer", "muon")
    assert said.count("zero3 cannot train with --optimizer muon") == 1, said
