"""`--plugin FILE.py`: a selection from outside the package, from the command line to disk and back."""

import json
import shutil

import pytest
import yaml

from tests.plugins import ABS_TOPK, forget_plugins
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

PLUGIN = ["--plugin", ABS_TOPK, "--activation", "abs_topk"]


@pytest.fixture(autouse=True)
def _apart():
    forget_plugins()
    yield
    forget_plugins()


@pytest.fixture
def run(train, tmp_path):
    result = train(*PLUGIN, "--run-name", "r", "--save-every", 10, "--keep-last", 2)
    assert result.code == 0, result.err
    return tmp_path / "checkpoints" / "r"


def test_it_trains_and_is_saved_evaluated_and_inspected(run, saekit):
    losses = [each["layers"]["layers.1"]["loss"] for each in metrics_of(run) if "layers" in each]
    assert losses[-1] < 0.9 * losses[0]
    config = json.loads((run / "latest" / "layers.1" / "cfg.json").read_text())
    assert (config["activation"], config["plugin"]) == ("abs_topk", "abs_topk.py")
    forget_plugins()
    result = saekit("eval", run, "--max-tokens", 500, "--json", "--plugin", ABS_TOPK)
    assert result.code == 0, result.err
    (layer,) = json.loads(result.out)["layers"]
    assert layer["reconstruction"]["l0"]["value"] == pytest.approx(4), "negative values count"
    result = saekit("inspect", run, "--plugin", ABS_TOPK)
    assert "abs_topk" in result.out
    result = saekit("report", run, "--plugin", ABS_TOPK, "--max-tokens", 500, "--latents", 8)
    assert result.code == 0, result.err


def test_it_goes_on_where_it_stopped(run, saekit, tmp_path):
    shutil.copytree(run, tmp_path / "before", symlinks=True)
    shutil.rmtree((run / "latest").resolve())
    forget_plugins()
    refused = saekit("train", "--resume", run / "step_00000010")
    assert refused.code == 2
    assert f"'abs_topk' is none of topk, batchtopk, groupmax: it needs --plugin {ABS_TOPK}" in refused.err
    result = saekit("train", "--resume", run / "step_00000010", "--plugin", ABS_TOPK)
    assert result.code == 0, result.err
    assert_same_tensors(tensors_of(run / "latest"), tensors_of(tmp_path / "before" / "latest"))


def test_without_it_a_checkpoint_says_what_is_missing(run, saekit, text_file, model_dir):
    forget_plugins()
    refused = saekit("eval", run)
    assert refused.code == 2
    assert f"it needs --plugin {ABS_TOPK}" in refused.err
    alone = shutil.copytree(run / "latest" / "layers.1", run.parent / "alone")  # nothing but what cfg.json says
    refused = saekit("eval", alone, text_file, "--model", model_dir, "--max-tokens", 500)
    assert refused.code == 2
    assert "pass the file of its plug-in, abs_topk.py, with --plugin" in refused.err


def test_a_checkpoint_names_no_code_that_is_run(run, saekit, tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text(f"import pathlib\n\npathlib.Path({str(tmp_path / 'sprung')!r}).touch()\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "plugin": [str(trap)]}))
    for command in (["eval", run, "--max-tokens", 500], ["inspect", run], ["train", "--resume", run]):
        saekit(*command, "--plugin", ABS_TOPK)
        assert not (tmp_path / "sprung").exists(), command


def test_a_configuration_can_name_it(saekit, model_dir, text_file, tmp_path):
    small = ["--ctx-len", 32, "--max-tokens", 512, "--layers", 1, "--num-latents", 64, "--k", 4, "--batch-size", 4]
    written = saekit("config", "--yes", model_dir, text_file, *small, *PLUGIN, "--run-name", "r")
    assert written.code == 0, written.err
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["plugin"] == [str(ABS_TOPK)]
    for command in (["config", "--yes"], ["plan", "--config", "run.yaml"], ["train", "--config", "run.yaml"]):
        forget_plugins()
        result = saekit(*command)
        assert result.code == 0, result.err
    assert (tmp_path / "checkpoints" / "r" / "latest").exists()


@pytest.mark.parametrize(
    ("text", "says"), [(None, "there is no such file"), ("1 / 0", "ZeroDivisionError"), ("def", "SyntaxError")]
)
def test_a_file_that_cannot_be_used(train, tmp_path, text, says):
    file = tmp_path / "own.py"
    if text is not None:
        file.write_text(text)
    result = train("--plugin", file, "--activation", "own")
    assert result.code == 2
    assert f"--plugin {file}: " in result.err
    assert says in result.err
