"""A selection from outside the package trains the same SAEs on several ranks."""

import shutil

import pytest
import torch
from datasets import Dataset

from tests.placement.conftest import CTX_LEN, STEPS
from tests.placement.test_equivalence import assert_same_run
from tests.plugins import ABS_TOPK

pytestmark = pytest.mark.slow
PLUGIN = ["--plugin", ABS_TOPK, "--activation", "abs_topk"]


@pytest.fixture(scope="module")
def other_tokens(tmp_path_factory):
    """Tokens that no run trains on."""
    folder = tmp_path_factory.mktemp("other") / "data"
    ids = torch.randint(0, 2000, (16, CTX_LEN), generator=torch.Generator().manual_seed(1))
    Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("placement", ["ddp", "layer-map"])
def test_a_plug_in_under_each_placement(train, gpt2_dir, other_tokens, forked, tmp_path, placement):
    """Trained, evaluated between steps, resumed, and evaluated again afterwards, on two ranks."""
    options = [*PLUGIN, "--eval-every", STEPS, "--eval-tokens", 256, "--eval-dataset", other_tokens]
    saved = ["--placement", placement, "--save-every", STEPS // 2, "--keep-last", 2]
    run = train(gpt2_dir, *options, *saved, ranks=2, name=f"plugin-{placement}")
    shutil.rmtree(run / f"step_{STEPS:08}")
    found = train(gpt2_dir, *options, "--placement", placement, "--resume", "auto", ranks=2, name=run.name)
    assert_same_run(found, train(gpt2_dir, *options))
    asked = ["eval", found, other_tokens, "--max-tokens", 256, "--json", "--plugin", ABS_TOPK]
    assert forked.run(asked, 2, tmp_path / "said", tmp_path, timeout=120) == [0, 0], (tmp_path / "said").read_text()
