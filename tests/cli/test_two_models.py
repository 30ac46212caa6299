"""`saekit train MODEL TEXT --crosscode-models OTHER`, and what the other commands make of such a run."""

import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import saekit as package
from saekit import UserError
from saekit.report import Reporters
from tests.cli.test_bad_input import assert_refused


@pytest.fixture(scope="module")
def other_dir(model_dir, tmp_path_factory):
    """A wider model with two more tokens, which its tokenizer has at its end."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = copy.deepcopy(AutoModelForCausalLM.from_pretrained(model_dir).config)
    config.hidden_size, config.num_hidden_layers, config.vocab_size = 24, 2, len(tokenizer)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(train, other_dir, tmp_path):
    where = ["--save-dir", tmp_path, "--run-name", "run", "--layers", "0,1"]
    # The type of models that are loaded already, which `auto` need not be.
    done = train("--crosscode-models", other_dir, "--dtype", "float32", *where)
    assert done.code == 0, done.err
    return tmp_path / "run", done


def test_files_name_both_models(run, train, model_dir, other_dir, tmp_path):
    folder, done = run
    assert f"Loading {other_dir} (up to layer 1 of 2)" in done.err
    index = json.loads((folder / "latest" / "checkpoint.json").read_text())
    assert (index["model"], index["other_model"]) == (str(model_dir), str(other_dir))
    assert index["hookpoints"] == ["layers.0", "layers.1"]
    coder = package.load(folder, "layers.1")
    assert coder.reads == {"layers.1": 16, "other.layers.1": 24}
    assert tuple(coder.trained_on) == (str(model_dir), "layers.1", str(other_dir))
    package.save(coder, tmp_path / "alone")
    assert package.load(tmp_path / "alone").trained_on == coder.trained_on
    again = train("--crosscode-models", other_dir, "--finetune", folder, "--layers", "0,1", "--save-dir", tmp_path)
    assert again.code == 0, again.err


def test_loaded_models_train_the_same(run, model_dir, other_dir, text_file, tmp_path):
    folder, _ = run
    models = [AutoModelForCausalLM.from_pretrained(each) for each in (model_dir, other_dir)]
    small = {"ctx_len": 32, "max_tokens": 2048, "batch_size": 4, "layers": "0,1", "num_latents": 64, "k": 4}
    small |= {"save_dir": tmp_path, "run_name": "loaded", "reporter": Reporters()}
    package.train(models[0], str(text_file), other_model=models[1], **small)
    expected = package.load_many(folder)
    for name, coder in package.load_many(tmp_path / "loaded").items():
        torch.testing.assert_close(coder.W_dec, expected[name].W_dec, rtol=0.05, atol=0.01)
    for given, problem in (
        ({"other_model": str(other_dir)}, "other_model is a name"),
        ({"other_model": models[1], "crosscode_models": "b"}, "both name the second model"),
        ({"other_tokenizer": AutoTokenizer.from_pretrained(other_dir)}, "a tokenizer needs a loaded model"),
        ({"other_model": models[1], "dtype": "float32"}, "is for loading the model"),
    ):
        with pytest.raises(UserError, match=problem):
            package.train(models[0], str(text_file), **small, **given)


def test_another_tokenizer_is_refused_before_anything_is_read(train, other_dir, tmp_path):
    folder = shutil.copytree(other_dir, tmp_path / "moved")
    said = json.loads((folder / "tokenizer.json").read_text())
    vocab = said["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    done = train("--crosscode-models", folder, "--save-dir", tmp_path / "runs")
    assert_refused(done, "its tokenizer differs from the first model's")
    assert "tokenizing" not in done.err
    nowhere = train("--crosscode-models", tmp_path / "nowhere", "--save-dir", tmp_path / "runs")
    assert_refused(nowhere, f"model '{tmp_path / 'nowhere'}'")
    assert not (tmp_path / "runs").exists()


def test_evaluating_inspecting_and_the_page(run, saekit, train, other_dir, tmp_path, text_file):
    folder, _ = run
    done = saekit("eval", folder, text_file, "--max-tokens", 512, "--include-training-data")
    assert done.code == 0, done.err
    for row in ("layers.0", "other.layers.0", "all", "other.all"):
        assert f"\n{row} " in done.out, done.out
    found = json.loads((folder / "latest" / "eval.json").read_text())
    assert found["other_model"] == found["other"]["model"] == str(other_dir)
    for layer in found["layers"]:
        assert [part["hookpoint"] for part in layer["parts"]] == layer["writes"]
        assert layer["other"]["ce"]["value"] > 0
    shown = saekit("inspect", folder)
    assert shown.code == 0, shown.err
    assert str(other_dir) in shown.out
    words = " ".join(shown.out.split())
    assert "layer first's own shared other's own 0 0.5 1 layers.0" in words
    assert "Crosscoders read and predict the hookpoint of their name in both models" in words
    one = " ".join(saekit("inspect", folder, "--layer", 1).out.replace("│", " ").split())
    assert "relative decoder norm ‖other‖ / (‖first‖ + ‖other‖)" in one
    inspected = json.loads(saekit("inspect", folder, "--json").out)
    for layer in inspected["layers"]:
        assert sum(layer["sharing"]["relative"]) == 64
    page = saekit("report", folder, text_file, "--output", tmp_path / "page.html", "--max-tokens", 512, "--latents", 8)
    assert page.code == 0, page.err
    text = (tmp_path / "page.html").read_text("utf-8")
    for part in (
        'data-part="other.layers.1"',
        'data-part="other.all"',
        "Latents of one model or of both",
        str(other_dir),
    ):
        assert part in text
    config = folder / "config.yaml"
    config.write_text("\n".join(line for line in config.read_text().splitlines() if "crosscode_models" not in line))
    assert_refused(saekit("eval", folder, text_file), "layers.0 is a crosscoder of two models", "--other-model")
    given = saekit(
        "eval", folder, text_file, "--max-tokens", 512, "--other-model", other_dir, "--include-training-data"
    )
    assert given.code == 0, given.err


def test_evaluating_while_training(train, saekit, other_dir, text_file, tmp_path):
    done = train(
        "--crosscode-models",
        other_dir,
        "--save-dir",
        tmp_path,
        "--run-name",
        "run",
        "--eval-every",
        8,
        "--eval-tokens",
        256,
    )
    assert done.code == 0, done.err
    assert f"Loading {other_dir} (all layers)" in done.err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [each["evaluation"] for each in records if each.get("kind") == "evaluation"]
    assert found
    for each in found:
        assert each["other"]["together"]["ce"]["value"] == pytest.approx(each["layers"][0]["other"]["ce"]["value"])


def test_another_kind_of_run_has_no_second_model(train, saekit, other_dir, text_file, tmp_path):
    assert train("--save-dir", tmp_path, "--run-name", "run").code == 0
    refused = saekit("eval", tmp_path / "run", text_file, "--other-model", other_dir)
    assert_refused(refused, "layers.1 is not a crosscoder of two models: leave out --other-model")
