"""Shells complete commands, options and values, through the variables that their scripts set."""

import json
import time

import pytest

from saekit.demo import MODEL_DIR
from tests.cli.conftest import built


def bash(words):
    return {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}


def others(words):
    return {"_TYPER_COMPLETE_ARGS": " ".join(words), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}


@pytest.fixture
def complete(monkeypatch, capsys, tmp_path):
    """`complete("train", "--act")`: the values that a shell would offer; nothing may be written to stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words, shell="bash"):
        line = ["saekit", *map(str, words)]
        for name, value in (bash(line) if shell == "bash" else others(line)).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("_SAEKIT_COMPLETE", f"complete_{shell}")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            built()(["--help"], prog_name="saekit", standalone_mode=False)
        out, err = capsys.readouterr()
        assert err == ""
        return out if shell == "zsh" else [line.partition("\t")[0] for line in out.splitlines() if line]

    return call


@pytest.fixture
def runs(tmp_path):
    """A folder with two runs and something else."""
    folder = tmp_path / "checkpoints"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").touch()
        (folder / name / "metrics.jsonl").touch()
    (folder / "notes").mkdir()
    return folder


def test_options_that_help_does_not_show(complete):
    assert complete("train", "m", "d", "--revive") == ["--revive-alpha"]
    assert "--help-all" in complete("train", "--help-a")


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["--activation", ""], ["topk", "batchtopk", "groupmax"]),
        (["--optimizer", "ad"], ["adam", "adam8bit"]),
        (["--placement", "z"], ["zero3"]),
        (["--source", ""], ["live", "cached"]),
        (["--launch", "layer"], ["layer-map", "layer-map-cpu"]),
        (["--resume", "a"], ["auto"]),
    ],
    ids=" ".join,
)
def test_values(complete, words, offers):
    assert complete("train", "m", "d", *words) == offers


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell(complete, shell):
    offered = complete("train", "m", "d", "--activation", "b", shell=shell)
    assert "batchtopk" in offered
    assert "groupmax" not in offered


def test_runs(complete, runs):
    assert complete("train", "m", "d", "--run-name", "") == ["one", "two"]
    assert complete("inspect", "checkpoints/t") == ["checkpoints/two"]
    assert complete("train", "m", "d", "--resume", "check") == ["checkpoints/one", "checkpoints/two"]
    runs.rename(runs.with_name("elsewhere"))
    assert complete("train", "m", "d", "--run-name", "") == []
    assert complete("train", "m", "d", "--save-dir", "elsewhere", "--run-name", "t") == ["two"]


def test_hookpoints_of_a_local_model(complete):
    """Paths that `saekit hookpoints` knows as well, found in the names of the weights, at once."""
    from saekit.activations.lm import model_shape
    from saekit.activations.structure import measure
    from saekit.config import ModelConfig

    began = time.perf_counter()
    offered = complete("train", MODEL_DIR, "d", "--hookpoints", "")
    took = time.perf_counter() - began
    assert offered[:4] == ["resid", "resid_pre", "mlp", "attn"]
    assert took < 1, f"{took:.1f} s"
    structure = measure(None, model_shape(ModelConfig(str(MODEL_DIR))).config)
    known = {name.replace(f"{structure.prefix}.0", f"{structure.prefix}.*") for name in structure.readings}
    assert len(offered) > 10
    assert set(offered[4:]) <= known

    one = complete("train", MODEL_DIR, "d", "--hookpoints", f"{structure.prefix}.1.")
    assert one
    assert set(one) <= structure.readings.keys()
    assert complete("train", MODEL_DIR, "d", "--crosscode", "mlp,at") == ["mlp,attn"]
    assert complete("hookpoints", MODEL_DIR, "resid_") == ["resid_pre"]


@pytest.mark.parametrize(
    ("architecture", "weight", "path"),
    [
        ("LlamaForCausalLM", "model.layers.0.mlp.up_proj.weight", "layers.*"),
        ("GPT2LMHeadModel", "transformer.h.0.mlp.c_fc.weight", "h.*"),
        ("GPT2LMHeadModel", "h.0.mlp.c_fc.weight", "h.*"),
        ("BertForMaskedLM", "bert.encoder.layer.0.output.dense.weight", "encoder.layer.*"),
        ("BertModel", "encoder.layer.0.output.dense.weight", "encoder.layer.*"),
    ],
)
def test_paths_are_relative_to_the_base_model(complete, tmp_path, architecture, weight, path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    index = {"weight_map": {weight: "a.safetensors", "wte.weight": "a.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    offered = complete("train", model, "d", "--hookpoints", "")
    assert offered[4] == path
    assert "wte" not in offered


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"config.json": b"{"},
        {"config.json": b"[]"},
        {"config.json": b"{}"},
        {"config.json": b"{}", "model.safetensors": b"\xff" * 40},
        {"config.json": b"{}", "model.safetensors.index.json": b"[1]"},
    ],
    ids=str,
)
def test_a_damaged_model_is_no_error(complete, tmp_path, damage):
    for name, content in damage.items():
        (tmp_path / name).write_bytes(content)
    assert complete("train", tmp_path, "d", "--hookpoints", "") == ["resid", "resid_pre", "mlp", "attn"]
