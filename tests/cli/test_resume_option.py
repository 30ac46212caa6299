"""`--resume`, `--resume auto`, `--resume PATH`."""

import shutil

import pytest

from tests.training.runs import assert_same_tensors, metrics_of, tensors_of


@pytest.fixture
def three_checkpoints(train, tmp_path):
    """A finished run of 16 steps that has kept those of step 10, 15 and 16, and a copy of it."""
    assert train("--run-name", "r", "--save-every", "5", "--keep-last", "3").code == 0
    run = tmp_path / "checkpoints" / "r"
    assert sorted(path.name for path in run.glob("step_*")) == ["step_00000010", "step_00000015", "step_00000016"]
    shutil.copytree(run, tmp_path / "before", symlinks=True)
    return run


def test_a_path_brings_the_options_along(saekit, three_checkpoints, tmp_path):
    result = saekit("train", "--resume", three_checkpoints / "step_00000010")
    assert result.code == 0, result.err
    assert f"Resuming from {three_checkpoints / 'step_00000010'}" in result.err
    assert_same_tensors(tensors_of(three_checkpoints / "latest"), tensors_of(tmp_path / "before" / "latest"))
    assert metrics_of(three_checkpoints) == metrics_of(tmp_path / "before")
    assert saekit("train", "--resume", three_checkpoints, "--log-every", "4").code == 0


def test_a_run_goes_on_from_where_it_lies_now(saekit, three_checkpoints, tmp_path):
    moved = tmp_path / "elsewhere"
    three_checkpoints.rename(moved)
    shutil.rmtree(moved / "step_00000016")
    result = saekit("train", f"--resume={moved}")
    assert result.code == 0, result.err
    assert not three_checkpoints.exists()
    assert_same_tensors(tensors_of(moved / "latest"), tensors_of(tmp_path / "before" / "latest"))


def test_the_maths_cannot_be_changed(saekit, three_checkpoints, tmp_path):
    result = saekit("train", "--resume", three_checkpoints, "--lr", "0.3", "--batch-size", "8", "--save-every", "2")
    assert result.code == 2
    assert "--lr was " in result.err
    assert " and is 0.3" in result.err
    assert "the global batch (--batch-size × --grad-acc-steps × ranks) was 4 and is 8" in result.err
    assert "save-every" not in result.err
    assert metrics_of(three_checkpoints) == metrics_of(tmp_path / "before")


def test_an_option_is_named_and_not_what_follows_from_it(train, three_checkpoints, tmp_path):
    """With more tokens come another warm-up and another threshold for dead latents, which nobody has set."""
    result = train("--run-name", "r", "--resume", "--max-tokens", "8192")
    assert result.code == 2
    assert (
        "--resume would continue a different training: --max-tokens was 2048 and is 8192. To train with these options, "
        "leave out --resume and start a run with another --run-name from its SAEs with --finetune checkpoints/r"
    ) in result.err
    result = train("--run-name", "r", "--resume", "--num-latents", "32")
    assert "a different training: --num-latents was 64 and is 32." in result.err
    assert "--finetune" not in result.err
    result = train("--run-name", "r", "--resume", "--lr-warmup-steps", "3")
    assert "a different training: --lr-warmup-steps was 4 and is 3." in result.err
    assert train("--run-name", "other", "--max-tokens", "4096", "--finetune", "checkpoints/r").code == 0


def test_more_data_in_the_same_place_are_named(train, three_checkpoints, text_file, tmp_path):
    lines = text_file.read_text().splitlines(keepends=True)
    (tmp_path / "t.jsonl").write_text("".join(lines[:60]))
    options = ("--run-name", "s", "--max-tokens", "999999")
    assert train(*options, data=tmp_path / "t.jsonl").code == 0
    (tmp_path / "t.jsonl").write_text("".join(lines[:90]))
    result = train(*options, "--resume", data=tmp_path / "t.jsonl")
    assert result.code == 2
    assert "a different training: the data gave " in result.err
    assert "--lr-warmup-steps" not in result.err


def test_other_data_in_the_same_place_is_refused(train, three_checkpoints, text_file):
    content = text_file.read_text()
    try:
        text_file.write_text("".join(reversed(content.splitlines(keepends=True))))
        result = train("--run-name", "r", "--resume")
    finally:
        text_file.write_text(content)
    assert result.code == 2
    assert "the data set has other tokens in step 16 than before" in result.err


def test_links_mean_what_they_say(saekit, three_checkpoints, tmp_path, monkeypatch):
    """`latest` is the run, which may have a newer one; `best` and a step are that checkpoint, from wherever named."""
    (three_checkpoints / "best").symlink_to("step_00000010")
    result = saekit("train", "--resume", f"{three_checkpoints}/best/")
    assert f"Resuming from {three_checkpoints / 'step_00000010'}" in result.err
    (three_checkpoints / "latest").unlink()
    (three_checkpoints / "latest").symlink_to("step_00000010")
    result = saekit("train", "--resume", three_checkpoints / "latest")
    assert f"Resuming from {three_checkpoints / 'step_00000016'}" in result.err
    monkeypatch.chdir(three_checkpoints / "step_00000015")
    result = saekit("train", "--resume", ".")
    assert "Resuming from ." in result.err
    assert metrics_of(three_checkpoints) == metrics_of(tmp_path / "before")
    result = saekit("train", "--resume", three_checkpoints / "step_00000099")
    assert result.code == 2
    assert f"the newest whole checkpoint is {three_checkpoints / 'step_00000016'}" in result.err


def test_auto_starts_and_goes_on(train, tmp_path):
    assert train("--run-name", "r", "--resume", "auto", "--save-every", "5", "--keep-last", "2").code == 0
    run = tmp_path / "checkpoints" / "r"
    whole = tensors_of(run / "latest")
    shutil.rmtree(run / "step_00000016")
    result = train("--run-name", "r", "--resume", "auto", "--save-every", "5", "--keep-last", "2")
    assert result.code == 0
    assert "Resuming from checkpoints/r/step_00000015" in result.err
    assert_same_tensors(tensors_of(run / "latest"), whole)


def test_auto_starts_anew_what_was_killed_before_its_first_checkpoint(train, tmp_path):
    run = tmp_path / "checkpoints" / "r"
    (run / ".step_00000005.partial" / "layers.1").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert train("--run-name", "r").code == 2
    assert train("--run-name", "r", "--resume", "auto").code == 0
    assert [record["step"] for record in metrics_of(run)] == list(range(1, 17))
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_auto_deletes_nothing_that_is_not_a_run(train, tmp_path):
    (tmp_path / "checkpoints" / "r").mkdir(parents=True)
    (tmp_path / "checkpoints" / "r" / "thesis.tex").write_text("")
    result = train("--run-name", "r", "--resume", "auto")
    assert result.code == 2
    assert "already exists" in result.err


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(saekit, three_checkpoints, tmp_path):
    spoilt = three_checkpoints / "step_00000016" / "layers.1" / "state.safetensors"
    content = bytearray(spoilt.read_bytes())
    content[-1] ^= 1
    spoilt.write_bytes(content)
    result = saekit("train", "--resume", three_checkpoints / "step_00000016")
    assert result.code == 2
    assert f"the newest whole checkpoint is {three_checkpoints / 'step_00000015'}" in result.err
    result = saekit("train", "--resume", three_checkpoints)
    assert result.code == 0
    assert "step_00000016 is damaged: layers.1/state.safetensors has changed" in result.err
    assert f"Resuming from {three_checkpoints / 'step_00000015'}" in result.err
    assert_same_tensors(tensors_of(three_checkpoints / "latest"), tensors_of(tmp_path / "before" / "latest"))


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--resume", "nowhere"], ["--resume nowhere", "no checkpoint", "--resume latest"]),
        (["--resume", "auto", "--overwrite"], ["--overwrite and --resume"]),
        (["--resume="], ["--resume .", "no checkpoint"]),
    ],
)
def test_what_cannot_be(train, options, messages):
    result = train(*options)
    assert result.code == 2
    assert all(message in result.err for message in messages), result.err


def test_the_hint_can_be_typed_as_it_stands(train, three_checkpoints):
    """Somebody has left out what follows the option, which took the next word for its value."""
    hint = train("--run-name", "r", "--resume", "nowhere").err.partition("write ")[2].partition(")")[0]
    result = train("--run-name", "r", *hint.split())
    assert result.code == 0, result.err
    assert "Resuming from checkpoints/r/step_00000016" in result.err


def test_a_path_and_another_name_contradict_each_other(train, three_checkpoints):
    result = train("--resume", three_checkpoints, "--run-name", "other")
    assert result.code == 2
    assert "--run-name other contradicts --resume" in result.err
