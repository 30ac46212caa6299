"""What can be known early is refused before the data are tokenized."""

import shutil
import sys

import pytest
import torch

from saekit import RunConfig, UserError
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import autoencoder
from saekit.placement.layer_map import LayerMap
from saekit.training.early import InMemory, check_inputs, check_units
from tests.cli.test_bad_input import assert_refused


@pytest.fixture
def early(train, monkeypatch):
    """Train, with an error that is not the user's as soon as data are read."""
    monkeypatch.setattr("saekit.training.live._load_data", lambda *_: pytest.fail("the data were read"))
    return train


@pytest.fixture
def placed():
    """A rank of two under layer-map that never meets the other."""
    placement = object.__new__(LayerMap)
    placement.rank, placement.world_size = 0, 2
    return placement


@pytest.fixture
def earlier_run(train, tmp_path):
    assert train("--run-name", "earlier").code == 0
    return shutil.move(tmp_path / "checkpoints", tmp_path / "before") / "earlier"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--log-with", "nosuch"], ["--log-with 'nosuch'", "tensorboard"]),
        (["--log-with", "clearml"], ["--log-with clearml", "pip install clearml"]),
        (["--finetune", "nosuch"], ["--finetune nosuch", "no such folder"]),
        (["--finetune", "owner/saes"], ["--finetune owner/saes", "downloaded"]),
        (["--finetune", "."], ["--finetune .", "no SAE"]),
        (["--eval-every", "5", "--eval-dataset", "nosuch.txt"], ["data set 'nosuch.txt'", "no such file"]),
        (["--save-dir", "/proc/saekit"], ["run folder /proc/saekit/", "/proc", "--save-dir"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_options(early, tmp_path, arguments, says):
    assert_refused(early(*arguments), *says, folder=tmp_path)


def test_a_file_in_the_way_of_the_run(early, tmp_path):
    (tmp_path / "taken").touch()
    assert_refused(early("--save-dir", "taken/below"), "run folder taken/below/", "taken is a file", "--save-dir")


def test_an_optimizer_whose_library_is_missing(early, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = early("--optimizer", "adam8bit")
    assert_refused(result, "--optimizer adam8bit needs bitsandbytes", "use --optimizer adam", folder=tmp_path)


def test_eight_bits_whose_library_is_missing(model_dir, text_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    cfg = RunConfig.from_flat({"model": str(model_dir), "dataset": str(text_file), "load_in_8bit": True})
    with pytest.raises(UserError, match="--load-in-8bit needs bitsandbytes"):
        check_inputs(cfg, torch.device("cuda"), InMemory())


def test_kernels_that_cannot_be_built(early, monkeypatch, tmp_path):
    monkeypatch.setattr("saekit.sae.kernels.native_build.why_not", lambda: "there is no compiler")
    assert_refused(early("--kernels", "native"), "native", "there is no compiler", folder=tmp_path)


def test_a_layer_map_that_does_not_fit(model_dir, text_file, placed):
    options = {"model": str(model_dir), "dataset": str(text_file), "layers": "0,1", "layer_map": "0:0"}
    cfg = RunConfig.from_flat(options)
    with pytest.raises(UserError, match="--layer-map '0:0' gives no rank for layer 1"):
        check_units(cfg, placed, [autoencoder(Hookpoint(f"layers.{number}", 16)) for number in range(2)])


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (None, ["--layers", "0,1"], "has no coder for layers.0, only for layers.1"),
        (None, ["--num-latents", "32"], "its coder for layers.1 has 64 latents for width 16, this run's has 32"),
        (-10, [], "layers.1/sae.safetensors is truncated"),
    ],
    ids=["another layer", "another size", "truncated"],
)
def test_saes_to_start_from(earlier_run, early, change, options, says):
    file = earlier_run / "latest" / "layers.1" / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:change])
    assert_refused(early("--finetune", earlier_run, *options), f"--finetune {earlier_run}", says)


def test_a_truncated_model(early, model_dir, tmp_path):
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert_refused(early(model=broken), f"model '{broken}' could not be loaded: model.safetensors is truncated")


def test_saes_that_are_gone_do_not_matter_to_a_run_that_goes_on(train, earlier_run):
    options = ("--run-name", "r", "--finetune", earlier_run, "--max-tokens", 512)
    assert train(*options).code == 0
    shutil.rmtree(earlier_run)
    result = train(*options, "--resume")
    assert result.code == 0, result.err
