"""What `saekit` names, called as a user's script would."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

import saekit
from saekit import RunConfig, SaeConfig, SaeTrainer, TrainConfig, UserError
from saekit.api import PARTS
from saekit.config.options import options_of
from saekit.report import Reporters
from tests.placement.conftest import torchrun

ROOT = Path(__file__).parents[1]
SMALL = {"ctx_len": 32, "max_tokens": 2048, "batch_size": 4, "layers": 1, "num_latents": 64, "k": 4}
NAMED = {**SMALL, "dtype": "float32"}  # else a CPU that is fast at bfloat16 gives names another model than objects
STEPS = 2048 // 32 // 4


def weights_of(checkpoint):
    return saekit.load(checkpoint).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def checkpoint(model_dir, text_file, tmp_path_factory):
    """A run from names, as the command line would do it."""
    folder = tmp_path_factory.mktemp("runs")
    return saekit.train(model_dir, str(text_file), save_dir=folder, run_name="a", reporter=Reporters(), **NAMED)


@pytest.fixture
def small(tmp_path):
    return {**NAMED, "save_dir": tmp_path, "run_name": "b", "reporter": Reporters()}


@pytest.fixture
def for_loaded(small):
    return {name: value for name, value in small.items() if name != "dtype"}


def test_all_names_are_there_and_shown():
    assert dir(saekit) == sorted(saekit.__all__)
    for name in saekit.__all__:
        assert getattr(saekit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = saekit.nosuch


def test_importing_and_listing_names_is_fast():
    code = "import sys, saekit; dir(saekit); sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_training_by_names(checkpoint):
    assert checkpoint.name == f"step_{STEPS:08d}"
    assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == STEPS


def test_training_where_gradients_are_off(checkpoint, model_dir, text_file, tmp_path):
    with torch.no_grad():
        run = saekit.train(model_dir, str(text_file), save_dir=tmp_path, reporter=Reporters(), **NAMED)
        assert not torch.is_grad_enabled()
    assert same(weights_of(run), weights_of(checkpoint))


def test_a_list_of_texts_trains_the_same_saes_as_their_file(checkpoint, model_dir, documents, small):
    again = saekit.train(model_dir, documents, **small)
    assert same(weights_of(again), weights_of(checkpoint))


@pytest.mark.parametrize("kind", ["rows", "splits", "stream", "tokens"])
def test_data_sets_in_memory(checkpoint, model_dir, documents, small, kind):
    rows = Dataset.from_dict({"text": documents})
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    data = {
        "rows": lambda: rows,
        "splits": lambda: DatasetDict(train=rows),
        "stream": lambda: rows.to_iterable_dataset(),
        "tokens": lambda: rows.map(lambda row: {"input_ids": [0, *tokenizer(row["text"])["input_ids"]]}),
    }[kind]()
    more = {"max_examples": len(documents)} if kind == "stream" else {}
    assert same(weights_of(saekit.train(model_dir, data, **small, **more)), weights_of(checkpoint))


def test_a_loaded_model_is_used_as_it_is_and_left_so(checkpoint, model_dir, text_file, for_loaded):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    again = saekit.train(model, str(text_file), **for_loaded)
    assert same(weights_of(again), weights_of(checkpoint))
    assert same(model.state_dict(), before)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert yaml.safe_load((again.parent / "config.yaml").read_text())["model"] == str(model_dir)


def test_a_loaded_model_from_nowhere_needs_a_tokenizer_for_text(model_dir, documents, for_loaded):
    loaded = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    loaded.config.name_or_path = loaded.name_or_path = ""
    with pytest.raises(UserError, match="add its tokenizer"):
        saekit.train(loaded, documents, **for_loaded)
    saekit.train(loaded, documents, tokenizer=AutoTokenizer.from_pretrained(model_dir), **for_loaded)


def test_evaluating_while_training_on_data_in_memory(model_dir, documents, small):
    with pytest.raises(UserError, match="needs an eval_dataset"):
        saekit.train(model_dir, documents, eval_every=8, **small)
    saekit.train(model_dir, documents[:1000], eval_dataset=documents[1000:], eval_every=8, eval_tokens=512, **small)
    lines = (small["save_dir"] / "b" / "metrics.jsonl").read_text().splitlines()
    assert [record["step"] for record in map(json.loads, lines) if "evaluation" in record] == [8, 16]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"laers": 1}, ["no option 'laers'", "did you mean layers"]),
        ({"learning_rate": 1}, ["no option 'learning_rate'"]),
        ({"k": 0, "lr": "fast"}, ["--k 0", "--lr 'fast'"]),
        ({"tokenizer": object()}, ["a tokenizer needs a loaded model"]),
        ({"dataset": 3}, ["the data set is a int"]),
        ({"model": 3}, ["model is a int"]),
        ({"model": None}, ["model is missing"]),
        ({"config": "nosuch.yaml"}, ["--config nosuch.yaml"]),
        ({"resume": "nosuch/run"}, ["--resume nosuch/run"]),
    ],
)
def test_what_cannot_be_used_is_refused(model_dir, documents, small, options, parts):
    given = {"model": model_dir, "dataset": documents, **small, **options}
    with pytest.raises(UserError) as refused:
        saekit.train(**given)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_options_of_loading_are_refused_for_a_loaded_model(model_dir, documents, for_loaded):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with pytest.raises(UserError, match="dtype='bfloat16' is for loading the model"):
        saekit.train(model, documents, dtype="bfloat16", **for_loaded)


def test_a_file_of_options_and_arguments_over_it(model_dir, text_file, tmp_path, checkpoint):
    file = tmp_path / "run.yaml"
    RunConfig.from_flat({"model": str(model_dir), "dataset": str(text_file), **NAMED, "k": 8}).to_yaml(file)
    again = saekit.train(config=file, k=4, save_dir=tmp_path, run_name="c", reporter=Reporters())
    assert same(weights_of(again), weights_of(checkpoint))
    assert RunConfig.from_yaml(again.parent / "config.yaml").train.sae.k == 4


def test_resuming_needs_the_path_only(model_dir, text_file, small):
    first = saekit.train(model_dir, str(text_file), **small)
    assert saekit.train(resume=first.parent, reporter=Reporters()) == first


def test_all_options_are_in_the_signature_and_the_docstring():
    shown = inspect.signature(saekit.train).parameters
    for part in PARTS:
        for option in options_of(part):
            assert option.name in shown
            assert f"    {option.name}: " in saekit.train.__doc__
    assert shown["batch_size"].default == 8


def test_the_trainer_takes_ctx_len_and_max_tokens_without_a_run(model_dir, documents, tmp_path, checkpoint):
    from saekit.data import chunk_and_tokenize

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    data = chunk_and_tokenize(Dataset.from_dict({"text": documents}), tokenizer, max_seq_len=16)
    cfg = TrainConfig(
        SaeConfig(num_latents=64, k=4), layers=1, batch_size=4, ctx_len=32, max_tokens=2048, save_dir=tmp_path
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    trained = SaeTrainer(cfg, data, model, tokenizer=tokenizer, reporter=Reporters()).fit()
    assert same(weights_of(trained), weights_of(checkpoint))


def test_training_options_from_yaml(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("model: m\ndataset: d\nbatch-size: 3\nk: 5\nctx_len: 7\n")
    cfg = TrainConfig.from_yaml(file)
    assert (cfg.batch_size, cfg.sae.k, cfg.ctx_len) == (3, 5, 7)
    file.write_text("bach_size: 3\nk: 0\n")
    with pytest.raises(UserError, match=r"'bach_size' \(did you mean batch_size\?\); --k 0"):
        TrainConfig.from_yaml(file)
    with pytest.raises(UserError, match="cannot be read"):
        TrainConfig.from_yaml(tmp_path / "nosuch.yaml")


def test_a_run_in_yaml_and_back(tmp_path):
    cfg = RunConfig.from_flat({"model": "m", "dataset": "d", "layers": "0-2", "hf_token": "secret", "lr": 0.1})
    cfg.to_yaml(tmp_path / "run.yaml")
    assert "secret" not in (tmp_path / "run.yaml").read_text()
    again = RunConfig.from_yaml(tmp_path / "run.yaml")
    assert (again.data, again.train, again.model.model) == (cfg.data, cfg.train, "m")
    with pytest.raises(UserError, match="cannot be written"):
        cfg.to_yaml(tmp_path / "no" / "folder.yaml")


def test_evaluating(checkpoint):
    with pytest.warns(UserWarning, match="only 16 sequences evaluated") as warned:
        results = saekit.evaluate(checkpoint, max_tokens=512, batch_size=4)
    assert warned[0].filename == __file__
    assert [layer.hookpoint for layer in results.layers] == ["layers.1"]
    written = json.loads((checkpoint / "eval.json").read_text())
    assert written["layers"][0]["reconstruction"]["fvu"]["value"] == results.layers[0].reconstruction.fvu.value
    assert written["held_out"] is True


def test_loading(checkpoint, tmp_path):
    run = checkpoint.parent
    names = ["layers.1"]
    assert list(saekit.load_many(run)) == list(saekit.load_many(str(checkpoint))) == names
    for path, hookpoint in [(run, None), (checkpoint, "layers.1"), (checkpoint / "layers.1", None)]:
        sae = saekit.load(path, hookpoint)
        assert same(sae.state_dict(), saekit.load_many(run)["layers.1"].state_dict())
    assert sae(torch.zeros(2, sae.d_in)).recon.shape == (2, sae.d_in)
    for path, hookpoint, message in [
        (run, "layers.9", "has no SAE 'layers.9': choose one of layers.1"),
        (checkpoint / "layers.1", "layers.2", "folder of one SAE, not of layers.2"),
        (tmp_path, None, "no SAE in"),
        (tmp_path / "nosuch", None, "no such folder"),
        ("./nosuch", None, "no such folder"),
    ]:
        with pytest.raises(UserError, match=message):
            saekit.load(path, hookpoint)
    with pytest.raises(UserError, match="no SAE in"):
        saekit.load_many(tmp_path)
    with pytest.raises(UserError, match="revision are options for a repository"):
        saekit.load(run, revision="main")


def test_loading_one_of_several_needs_a_hookpoint(tmp_path):
    for layer in (2, 10):
        saekit.Sae(4, 8, 2).save_to_disk(tmp_path / f"layers.{layer}")
    with pytest.raises(UserError, match=r"has several SAEs: choose one of layers\.2, layers\.10"):
        saekit.load(tmp_path)
    assert saekit.load(tmp_path, "layers.10").d_in == 4


def test_loading_from_the_hub(monkeypatch, tmp_path):
    saekit.Sae(4, 8, 2).save_to_disk(tmp_path / "layers.3")
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert saekit.load("owner/saes", "layers.3", revision="v1").num_latents == 8
    assert list(saekit.load_many("owner/saes")) == ["layers.3"]
    assert asked == [
        ("owner/saes", {"allow_patterns": "layers.3/*", "revision": "v1"}),
        ("owner/saes", {}),
    ]


def test_a_hub_that_cannot_be_reached_is_one_sentence():
    with pytest.raises(UserError) as refused:
        saekit.load("nobody/nothing")
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_training_in_a_script_that_a_launcher_started(model_dir, documents, tmp_path, for_loaded, forked):
    script = tmp_path / "script.py"
    options = {name: value for name, value in for_loaded.items() if name not in ("reporter", "save_dir", "batch_size")}
    script.write_text(
        "import torch, saekit\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(model_dir)!r}, dtype=torch.float32)\n"
        f"saekit.train(model, {documents!r}, save_dir={str(tmp_path / 'two')!r}, batch_size=2, **{options!r})\n"
    )
    done = torchrun(forked, script)
    assert done.returncode == 0, done.stderr
    assert ", ddp on 2 ranks," in done.stderr
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    one = weights_of(saekit.train(model, documents, **for_loaded))
    two = weights_of(tmp_path / "two" / "b")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)
