"""The examples that work with a trained run, as a reader would start them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from saekit import Sae

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def start(forked):
    def start(name, *arguments):
        done = forked.complete(EXAMPLES / name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return start


@pytest.mark.parametrize("name", ["steer.py", "gather_activations.py"])
def test_they_are_short(name):
    assert len((EXAMPLES / name).read_text("utf-8").splitlines()) < 60


def test_steering_changes_what_is_written(demo_run, start):
    said = start("steer.py", demo_run, "--layer", 3, "--strength", 20, "--new-tokens", 12)
    as_it_is, pushed = said.split("--- as it is\n")[1].split("--- pushed\n")
    assert as_it_is.startswith("import os")
    assert pushed.startswith("import os")
    assert as_it_is.strip() != pushed.strip()
    # Without a push both are the same.
    said = start("steer.py", demo_run, "--layer", 3, "--strength", 0, "--new-tokens", 12)
    as_it_is, pushed = said.split("--- as it is\n")[1].split("--- pushed\n")
    assert as_it_is.strip() == pushed.strip()


def test_gathered_codes_decode_to_the_reconstruction(demo_run, tmp_path, start):
    out = tmp_path / "acts.safetensors"
    said = start("gather_activations.py", demo_run, EXAMPLES / "steer.py", "--out", out, "--ctx-len", 32)
    assert "layers.3.resid" in said
    tensors = load_file(out)
    sae = Sae.load_many(demo_run)["layers.3"]
    resid = tensors["layers.3.resid"].float()
    assert tensors["input_ids"].shape == resid.shape[:2]
    with torch.no_grad():
        recon = sae.decode(tensors["layers.3.acts"], tensors["layers.3.latents"].long())
        again = sae(resid).recon
    # The activations are kept in 16 bits.
    assert (recon - again).norm() < 0.02 * again.norm()
