"""What a user can get wrong: exit code 2, one line that says what was given and what to do, nothing half-written."""

import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file


def assert_refused(result, *says, folder=None):
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1] == lines[0]
    for part in says:
        assert part in lines[0]
    if folder is not None:
        assert not any(folder.iterdir()), list(folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "1,7"], ["--layers 7", "out of range", "3 layers, 0 to 2"]),
        (["--layers", "3-1"], ["--layers '3-1'", "is empty"]),
        (["--layers", ""], ["--layers ''"]),
        (["--layers", "a"], ["--layers 'a'", "16,24"]),
        (["--k", "65"], ["--k 65", "64 latents"]),
        (
            ["--num-latents", "64", "--expansion-factor", "4"],
            ["--num-latents 64", "--expansion-factor 4", "one of them"],
        ),
        (["--activation", "relu"], ["--activation", "batchtopk"]),
        (["--activation", "batchtopk", "--multi-topk"], ["--multi-topk", "batchtopk"]),
        (["--max-norm-multiple", "0.5"], ["--max-norm-multiple 0.5", "at least 1"]),
        (["--activation", "groupmax", "--k", "7"], ["--activation groupmax", "--k 7", "not a multiple"]),
        (["--ctx-len", "65"], ["--ctx-len 65", "64 tokens"]),
        (["--batch-size", "1000"], ["64 sequences of 32 tokens", "1000", "--batch-size"]),
        (["--max-tokens", "100"], ["--max-tokens 100", "3 sequences"]),
        (["--text-column", "body"], ["--text-column 'body'", "text, id"]),
        (["--split", "nosuch"], ["--split nosuch"]),
        (["--load-in-8bit"], ["--load-in-8bit", "cpu", "--dtype bfloat16"]),
        (["--log-with", "nosuch"], ["--log-with 'nosuch'", "tensorboard"]),
        (["--overwrite", "--resume"], ["--overwrite and --resume"]),
        (["--resume"], ["--resume", "no checkpoint"]),
        (["--lr", "-1"], ["--lr", "greater than 0"]),
        (["--data-seed", "-1"], ["--data-seed", "greater than or equal to 0"]),
        (["--layer-stride", "2", "--layers", "1"], ["--layers and --layer-stride"]),
        (["--skip-connection"], ["--skip-connection is for transcoders: give --transcode, or --reads and --writes"]),
        (["--crosscode", "resid", "--skip-connection"], ["--skip-connection is for transcoders"]),
        (["--reads", "mlp:in"], ["--reads is given without --writes"]),
        (["--writes", "mlp"], ["--writes is given without --reads"]),
        (["--hookpoints", "mlp", "--crosscode", "resid"], ["--hookpoints and --crosscode each say"]),
        (["--transcode", "--crosscode", "resid"], ["--transcode goes with --hookpoints, not with --crosscode"]),
        (["--transcode", "--reads", "mlp:in", "--writes", "mlp"], ["--transcode goes with --hookpoints, not with"]),
        (["--transcode", "--hookpoints", "mlp:in"], ["--transcode --hookpoints mlp:in", "Name the modules"]),
        (
            ["--reads", "layers.1.mlp", "--writes", "layers.0.mlp", "--layers", "0-1"],
            ["must come before", "layers.0.mlp first"],
        ),
        (["--reads", "resid", "--writes", "resid"], ["both name layers.1", "use --hookpoints instead"]),
        (
            ["--reads", "mlp:in", "--writes", "layers.0.mlp", "--layers", "0-2"],
            ["--reads names 3", "--writes 1", "to form pairs"],
        ),
        (["--crosscode", "layers.*.mpl"], ["--crosscode layers.*.mpl: there is no such module"]),
        (["--finetune", "nosuch"], ["--finetune nosuch"]),
        (["--run-name", "a/b"], ["--run-name 'a/b'"]),
        (["--data-args", "streaming=true"], ["--max-examples"]),
        (["--config", "nosuch.yaml"], ["--config nosuch.yaml"]),
        (["--exclude-tokens", "x"], ["--exclude-tokens 'x'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options(train, tmp_path, arguments, says):
    assert_refused(train(*arguments), *says, folder=tmp_path)


@pytest.mark.parametrize("model", ["./nosuch", "/nosuch/model", "someone/no-such-model"])
def test_unknown_model(train, tmp_path, model):
    assert_refused(train(model=model), f"model {model!r}", folder=tmp_path)


@pytest.mark.parametrize(
    "data", ["nosuch.jsonl", "./nosuch", "/nosuch/data", "someone/no-such-data", "nosuch.bin", "no/*.txt"]
)
def test_unknown_data(train, tmp_path, data):
    assert_refused(train(data=data), f"data set {data!r}", folder=tmp_path)


def test_missing_arguments(saekit, model_dir, tmp_path):
    assert_refused(saekit("train", model_dir), "DATASET is missing", folder=tmp_path)


def test_unknown_option(saekit, tmp_path):
    result = saekit("train", "a", "b", "--no-such-option")
    assert result.code == 2
    assert "no-such-option" in result.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch_siz: 8\n", ["no option 'batch_siz'"]),
        ("grad_acc_steps: many\n", ["--grad-acc-steps 'many'"]),
        ("- 1\n- 2\n", ["--config", "found a list"]),
        ("a: [\n", ["not valid YAML"]),
    ],
)
def test_yaml(train, tmp_path, tmp_path_factory, text, says):
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_text(text)
    assert_refused(train("--config", file), *says, folder=tmp_path)


def test_all_problems_at_once(train, tmp_path):
    assert_refused(
        train("--k", "-1", "--layers", "x", "--lr", "0"), "--k '-1'", "--layers 'x'", "--lr '0'", folder=tmp_path
    )


@pytest.mark.parametrize("texts", [["abc"], [""], []], ids=["short", "empty text", "no row"])
def test_too_little_text(train, tmp_path, tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("data") / "set"
    Dataset.from_dict({"text": texts}).save_to_disk(folder)
    result = train(data=folder)
    assert_refused(result, folder=tmp_path)
    assert "--ctx-len 32" in result.err or "empty" in result.err


def test_a_short_bin_file(train, tmp_path, tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "tokens.bin"
    file.write_bytes(b"\0" * 10)
    assert_refused(train(data=file), "less than one sequence", folder=tmp_path)
    assert_refused(train("--data-args", "dtype=int8", data=file), "dtype=int8", folder=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_activations(train, tmp_path, tmp_path_factory, model_dir, value):
    broken = tmp_path_factory.mktemp("broken")
    shutil.copytree(model_dir, broken, dirs_exist_ok=True)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = value
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    result = train("--layers", "0,1", model=broken)
    assert_refused(result, "layers.1", "NaN or Inf", "the first batch", folder=tmp_path)


def test_a_model_without_some_weights(train, tmp_path, tmp_path_factory, model_dir):
    broken = tmp_path_factory.mktemp("broken")
    shutil.copytree(model_dir, broken, dirs_exist_ok=True)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert_refused(train(model=broken), "weights such as", "layers.1.mlp.down_proj.weight", folder=tmp_path)


def test_existing_run(train, tmp_path):
    assert train("--run-name", "r").code == 0
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert_refused(train("--run-name", "r"), "checkpoints/r", "--resume", "--overwrite", "--run-name")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert train("--run-name", "r", "--overwrite").code == 0
    result = train("--run-name", "r", "--resume", "--lr", "0.3")
    assert_refused(result, "--lr was", "is 0.3")


def test_overwrite_deletes_runs_only(train, tmp_path):
    precious = tmp_path / "checkpoints" / "r"
    precious.mkdir(parents=True)
    (precious / "thesis.tex").write_text("x")
    assert_refused(train("--run-name", "r", "--overwrite"), "does not look like a run")
    assert (precious / "thesis.tex").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
@pytest.mark.parametrize("command", ["inspect", "finetune", "resume"])
def test_damaged_checkpoint(saekit, train, tmp_path, damage, command):
    assert train("--run-name", "r").code == 0
    file = tmp_path / "checkpoints/r/latest/layers.1/sae.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20])
    result = {
        "inspect": lambda: saekit("inspect", "checkpoints/r"),
        "finetune": lambda: train("--run-name", "other", "--finetune", "checkpoints/r"),
        "resume": lambda: train("--run-name", "r", "--resume"),
    }[command]()
    if damage == "missing" and command == "finetune":
        assert_refused(result, "--finetune checkpoints/r")
    else:
        assert_refused(result, "sae.safetensors")
    assert not (tmp_path / "checkpoints/other").exists()


def test_inspect_of_nothing(saekit, tmp_path):
    assert_refused(saekit("inspect", "nosuch"), "nosuch")
    assert_refused(saekit("inspect", tmp_path), str(tmp_path))


def test_inspect_of_a_layer_that_is_not_there(saekit, train):
    assert train("--run-name", "r").code == 0
    assert_refused(saekit("inspect", "checkpoints/r", "--layer", "9"), "layers.1")


def test_debug_shows_where(train):
    from saekit import UserError

    with pytest.raises(UserError):
        train("--k", "65", "--debug")


def test_a_fault_of_ours_is_one_line_and_code_1(train, monkeypatch):
    monkeypatch.setattr("saekit.training.live.load_sequences", lambda *a: 1 / 0)
    result = train()
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("Error: ZeroDivisionError")
    assert "Traceback" not in result.err


def test_torch_is_what_it_was():
    assert torch.is_grad_enabled()
