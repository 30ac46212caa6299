"""`saekit eval`: what it evaluates on, what it prints and what it leaves."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from saekit import Sae
from saekit.analysis import eval_checkpoint
from saekit.runs.files import point
from saekit.runs.layout import EVAL_FILE


@pytest.fixture
def run(train, tmp_path):
    """A run that read a part of its data: 64 sequences of 32 tokens."""
    result = train("--save-dir", tmp_path, "--run-name", "run")
    assert result.code == 0, result.err
    return tmp_path / "run"


def the_file(run):
    return json.loads(((run / "latest").resolve() / EVAL_FILE).read_text("utf-8"))


def test_on_what_the_run_left_unread(run, saekit):
    result = saekit("eval", run, "--max-tokens", 1000)
    assert result.code == 0, result.err
    record = the_file(run)
    assert record["held_out"] is True
    assert (record["sequences"], record["ctx_len"], record["scored"]) == (1000 // 32, 32, 1000 // 32 * 31)
    assert record["tokens"] < 1000 // 32 * 32  # the separators train nothing
    (layer,) = record["layers"]
    assert layer["hookpoint"] == "layers.1"
    assert 0 < layer["reconstruction"]["fvu"]["value"] < 2
    for name, own in layer["grafted"].items():  # there is one layer
        assert own == pytest.approx(record["together"][name])
    assert layer["grafted"]["kl"]["value"] > 0
    for shown in ("layers.1", "CE", "documents of the run's data set that it was not trained on", "next token"):
        assert shown in result.out
    assert f"{layer['reconstruction']['fvu']['value']:.4f}" in result.out


@pytest.mark.parametrize("columns", [80, 120])
def test_no_number_is_cut_off(run, saekit, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = saekit("eval", run, "--max-tokens", 1000).out
    assert "…" not in out
    (layer,) = the_file(run)["layers"]
    lines = [line for line in out.splitlines() if line.startswith("layers.1")]
    assert f"{layer['grafted']['ce_zero_ablated']['value']:.3f}" in lines[1]
    assert lines[1].count("±") == (2 if columns == 80 else 5)


def test_a_checkpoint_that_is_saved_meanwhile_does_not_get_the_numbers(train, saekit, tmp_path, monkeypatch):
    assert train("--save-dir", tmp_path, "--run-name", "run", "--save-every", 9, "--keep-last", 2).code == 0
    earlier, later = tmp_path / "run" / "step_00000009", tmp_path / "run" / "step_00000016"
    point(tmp_path / "run" / "latest", earlier)
    real = eval_checkpoint.evaluate

    def evaluate(*arguments):
        point(tmp_path / "run" / "latest", later)
        return real(*arguments)

    monkeypatch.setattr(eval_checkpoint, "evaluate", evaluate)
    assert saekit("eval", tmp_path / "run", "--max-tokens", 500).code == 0
    assert (earlier / EVAL_FILE).exists()
    assert not (later / EVAL_FILE).exists()


def test_few_sequences_are_warned_of(run, saekit):
    result = saekit("eval", run, "--max-tokens", 64)
    assert "Warning: only 2 sequences evaluated: with fewer than 50 the intervals are rough" in result.out
    (warning,) = the_file(run)["warnings"]
    assert warning in " ".join(result.out.split())
    result = saekit("eval", run, "--max-tokens", 1600)
    assert "Warning" not in result.out
    assert the_file(run)["warnings"] == []


def test_an_sae_that_was_trained_elsewhere_is_warned_of(run, saekit, tmp_path, model_dir, text_file):
    # Its files say where it was trained, whatever the folder is called; and the model's weights are not the same.
    shutil.copytree((run / "latest" / "layers.1").resolve(), tmp_path / "saes" / "layers.2")
    other = shutil.copytree(model_dir, tmp_path / "other-model")
    weights = load_file(other / "model.safetensors")
    save_file({name: -each for name, each in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    result = saekit("eval", tmp_path / "saes", text_file, "--model", other, "--max-tokens", 1600)
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "saes" / EVAL_FILE).read_text("utf-8"))
    elsewhere = "the SAE that is evaluated at layers.2 was trained at layers.1"
    another = f"the SAEs were trained on {model_dir}, but this model is {other}"
    assert record["warnings"][:2] == [elsewhere, another]
    shown = " ".join(result.out.split())
    assert f"Warning: {elsewhere}" in shown
    assert f"Warning: {another}" in shown


def test_twice_the_same(run, saekit):
    first, second = (json.loads(saekit("eval", run, "--max-tokens", 500, "--json").out) for _ in range(2))
    assert {**first, "date": ""} == {**second, "date": ""}
    assert second == the_file(run)


def test_one_layer(run, saekit):
    assert saekit("eval", run, "--max-tokens", 500).code == 0
    whole = the_file(run)
    result = saekit("eval", run / "latest" / "layers.1", "--max-tokens", 500)
    assert result.code == 0, result.err
    alone = json.loads((run / "latest" / "layers.1" / EVAL_FILE).read_text("utf-8"))
    assert alone["layers"] == whole["layers"]


def test_training_data_is_not_called_held_out(train, saekit, tmp_path):
    assert train("--save-dir", tmp_path, "--run-name", "all", "--max-tokens", 10**9).code == 0
    result = saekit("eval", tmp_path / "all")
    assert result.code == 2
    assert "too little is held out" in result.err
    result = saekit("eval", tmp_path / "all", "--include-training-data", "--max-tokens", 500)
    assert result.code == 0, result.err
    assert the_file(tmp_path / "all")["held_out"] is False
    assert "trained on included" in result.out


def test_another_data_set(run, saekit, tmp_path, text_file):
    other = tmp_path / "other.txt"
    other.write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    result = saekit("eval", run, other)
    assert result.code == 0, result.err
    record = the_file(run)
    assert record["dataset"] == str(other)
    assert record["held_out"] is None
    # The run's own, named, is its own still.
    assert saekit("eval", run, text_file, "--max-tokens", 500).code == 0
    assert the_file(run)["held_out"] is True


def test_another_split_that_overlaps(train, saekit, tmp_path):
    texts = (json.dumps({"text": f"{n * n} is {n} times {n}, as {n} plus {n} is {n + n}"}) for n in range(60))
    data = tmp_path / "numbers.jsonl"
    data.write_text("\n".join(texts), encoding="utf-8")
    options = ["--split", "train[:50%]", "--save-dir", tmp_path, "--run-name", "half", "--max-tokens", 10**9]
    assert train(*options, data=data).code == 0
    everything = saekit("eval", tmp_path / "half", "--split", "train", "--max-tokens", 10**9, "--json")
    assert everything.code == 0, everything.err
    record = json.loads(everything.out)
    assert record["held_out"] is True
    assert "without documents that the run was trained on" in record["data"]
    rest = json.loads(saekit("eval", tmp_path / "half", "--split", "train[50%:]", "--max-tokens", 10**9, "--json").out)
    assert rest["layers"] == record["layers"]
    result = saekit("eval", tmp_path / "half", "--split", "train[:20%]")
    assert result.code == 2
    assert "too little is held out" in result.err


def test_saes_that_do_not_say_where_they_come_from(saekit, tmp_path, model_dir, text_file):
    Sae(16, 64, 4).save_to_disk(tmp_path / "saes" / "layers.0")
    result = saekit("eval", tmp_path / "saes")
    assert result.code == 2
    assert "--model" in result.err
    result = saekit("eval", tmp_path / "saes", "--model", model_dir)
    assert result.code == 2
    assert "DATASET" in result.err
    result = saekit("eval", tmp_path / "saes", text_file, "--model", model_dir, "--max-tokens", 200)
    assert result.code == 0, result.err
    assert "layers.0" in result.out


def test_an_sae_of_another_model(run, saekit, tmp_path, text_file, model_dir):
    Sae(12, 64, 4).save_to_disk(tmp_path / "saes" / "layers.0")
    result = saekit("eval", tmp_path / "saes", text_file, "--model", model_dir)
    assert result.code == 2
    assert "for a width of 12, but this model's is 16" in result.err


def test_a_folder_that_cannot_be_written_to(run, saekit, monkeypatch):
    def refuse(source, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("saekit.runs.files.os.replace", refuse)
    result = saekit("eval", run, "--max-tokens", 200)
    assert result.code == 2
    assert "eval.json cannot be written (Read-only file system)" in result.err
    assert not list((run / "latest").glob("eval.json*"))


def test_inspect_shows_it(run, saekit):
    assert json.loads(saekit("inspect", run, "--json").out)["evaluation"] is None
    assert saekit("eval", run, "--max-tokens", 500).code == 0
    record = the_file(run)
    recovered = record["layers"][0]["grafted"]["ce_recovered"]["value"]
    for path in (run, run / "latest" / "layers.1"):
        result = saekit("inspect", path)
        assert result.code == 0, result.err
        assert f"{recovered:.4f}" in result.out
        assert "Evaluated on" in result.out
        assert "Warning: only 15 sequences evaluated" in " ".join(result.out.split())
    assert json.loads(saekit("inspect", run, "--json").out)["evaluation"] == record
    (run / "latest" / EVAL_FILE).write_text('{"format": 1}', encoding="utf-8")
    assert "eval.json is damaged: run saekit eval again" in saekit("inspect", run).err
