"""Every way to open an SAE in a checkpoint compares its files with the checkpoint's checksums."""

import json
import shutil

import pytest

import saekit
from saekit import UserError
from saekit.analysis.inspect import inspect_path
from saekit.report import Reporters
from saekit.runs.index import OWN
from saekit.runs.recovery import find_checkpoint
from saekit.sae.trained_on import TrainedOn, same_model
from tests.cli.conftest import saekit as command  # noqa: F401  # a fixture

OPTIONS = {"ctx_len": 32, "max_tokens": 2048, "batch_size": 4, "num_latents": 64, "k": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def made(model_dir, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    saekit.train(
        model_dir, str(text_file), layers=[1, 2], save_dir=folder, run_name="r", reporter=Reporters(), **OPTIONS
    )
    return folder / "r"


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy", symlinks=True)


def flip(file, at=-40):
    """Flip a bit in two bytes: of weights, by default, which stay numbers."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    content[at + 4] ^= 1
    file.write_bytes(content)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def typed(command, name):  # noqa: F811
    def call(*arguments):
        result = command(name, *arguments)
        if result.code:
            raise UserError(result.err.splitlines()[-1])

    return call


@pytest.fixture
def doors(command, model_dir, text_file):  # noqa: F811
    """Every way to open the SAEs of a run, and the same without the checks."""

    def train(path):
        options = {**OPTIONS, "layers": [1, 2], "save_dir": path.parent, "run_name": "new"}
        saekit.train(model_dir, str(text_file), finetune=path, reporter=Reporters(), **options)

    few = ("--max-tokens", 1600)
    return {
        "load": (lambda path: saekit.load(path, "layers.1"), lambda path: saekit.load(path, "layers.1", verify=False)),
        "load_many": (saekit.load_many, lambda path: saekit.load_many(path, verify=False)),
        "evaluate": (
            lambda path: saekit.evaluate(path, max_tokens=1600),
            lambda path: saekit.evaluate(path, max_tokens=1600, verify=False),
        ),
        "eval": (
            lambda path: typed(command, "eval")(path, *few),
            lambda path: typed(command, "eval")(path, *few, "--no-verify"),
        ),
        "inspect": (typed(command, "inspect"), lambda path: typed(command, "inspect")(path, "--no-verify")),
        "report": (
            lambda path: typed(command, "report")(path, *few, "--latents", 4),
            lambda path: typed(command, "report")(path, *few, "--latents", 4, "--no-verify"),
        ),
        "finetune": (train, None),
    }


DOORS = ("load", "load_many", "evaluate", "eval", "inspect", "report", "finetune")


@pytest.mark.parametrize("door", DOORS)
def test_two_flipped_bytes_do_not_go_through(run, doors, door):
    flip(run / "latest" / "layers.1" / "sae.safetensors")
    enter, without_check = doors[door]
    with pytest.raises(UserError, match=r"layers\.1/sae\.safetensors has changed since it was saved") as refused:
        enter(run)
    assert ("--no-verify" in str(refused.value)) == (without_check is not None)
    if without_check is not None:
        without_check(run)


@pytest.mark.parametrize("door", DOORS)
def test_a_whole_checkpoint_opens(run, doors, door):
    doors[door][0](run)


def test_what_describes_the_sae_is_compared_too(run):
    edit(run / "latest" / "layers.2" / "cfg.json", k=5)
    assert saekit.load(run, "layers.1").k == 4
    for refused in (lambda: saekit.load(run, "layers.2"), lambda: inspect_path(run)):
        with pytest.raises(UserError, match=r"layers\.2/cfg\.json has"):
            refused()
    assert saekit.load(run, "layers.2", verify=False).k == 5


def test_counters_are_compared_by_what_reads_them(run):
    flip(run / "latest" / "layers.1" / "state.safetensors")
    saekit.load(run, "layers.1")
    with pytest.raises(UserError, match=r"layers\.1/state\.safetensors has changed"):
        inspect_path(run, 1)
    assert len(inspect_path(run, 1, verify=False).layers) == 1
    assert len(inspect_path(run, 2).layers) == 1


def test_through_links_and_by_relative_paths(run, tmp_path, monkeypatch):
    flip(run / "latest" / "layers.1" / "sae.safetensors")
    (tmp_path / "short").symlink_to(run / "latest" / "layers.1")
    monkeypatch.chdir(run / "latest")
    for path in ("layers.1", tmp_path / "short", run / "latest" / "layers.1"):
        with pytest.raises(UserError, match="has changed since it was saved"):
            saekit.load(path)


def test_what_no_checkpoint_lists_opens_as_before(run, tmp_path):
    checkpoint = (run / "latest").resolve()
    flip(checkpoint / "layers.1" / "sae.safetensors")
    shutil.copytree(checkpoint / "layers.1", tmp_path / "alone" / "layers.1")
    assert inspect_path(tmp_path / "alone" / "layers.1").layers[0].k == 4
    mine = saekit.load(tmp_path / "alone" / "layers.1")
    assert mine.trained_on.hookpoint == "layers.1"
    saekit.save(mine, checkpoint / "edited" / "layers.1")
    assert saekit.load(checkpoint / "edited" / "layers.1").k == 4
    # Another tool's file of the same name says nothing, be it in the folder above or further up.
    for content in ('{"epoch": 3}', "[1]"):
        (tmp_path / "checkpoint.json").write_text(content)
        assert saekit.load(tmp_path / "alone" / "layers.1").k == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step": 15}, "its content has changed since it was written"),
        ({"files": {}}, "its content has changed since it was written"),
        ({OWN: "0" * 32}, "its content has changed since it was written"),
        ({OWN: None}, "its content has changed since it was written"),
    ],
)
def test_a_changed_index_is_noticed_by_all(run, changes, says):
    checkpoint = (run / "latest").resolve()
    edit(checkpoint / "checkpoint.json", **changes)
    for enter in (saekit.load_many, inspect_path, find_checkpoint):
        with pytest.raises(UserError, match=f"checkpoint.json.*{says}"):
            enter(run)
    assert list(saekit.load_many(run, verify=False)) == ["layers.1", "layers.2"]
    assert len(inspect_path(run, verify=False).layers) == 2


def test_a_checksum_by_another_name_is_damage(run):
    file = (run / "latest").resolve() / "checkpoint.json"
    file.write_text(file.read_text().replace(OWN, OWN.replace("checksum", "checksun")))
    with pytest.raises(UserError, match="its checksum is not named"):
        saekit.load_many(run)


def test_an_index_of_a_development_version_has_no_checksum(run):
    file = (run / "latest").resolve() / "checkpoint.json"
    index = json.loads(file.read_text())
    del index[OWN]
    file.write_text(json.dumps(index))
    assert list(saekit.load_many(run)) == ["layers.1", "layers.2"]
    assert find_checkpoint(run).index == index
    del index["files"]["layers.1/sae.safetensors"]
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"does not list the files of layers\.1"):
        saekit.load(run, "layers.1")


def test_an_index_that_is_no_json(run):
    ((run / "latest").resolve() / "checkpoint.json").write_text("{")
    with pytest.raises(UserError, match=r"checkpoint\.json is damaged: it is not JSON.*verify=False"):
        saekit.load(run, "layers.1")
    assert saekit.load(run, "layers.1", verify=False).k == 4


def test_an_sae_knows_what_it_was_trained_on(run, model_dir, tmp_path):
    sae = saekit.load(run, "layers.1")
    assert sae.trained_on == TrainedOn(str(model_dir), "layers.1")
    saekit.save(sae, tmp_path / "saved")
    assert saekit.load(tmp_path / "saved").trained_on == sae.trained_on
    (run / "latest" / "layers.1" / "saekit.json").unlink()
    assert saekit.load(run, "layers.1", verify=False).trained_on == sae.trained_on, "the index says so, too"
    saekit.save(saekit.Sae(8, 16, 2), tmp_path / "fresh" / "layers.1")
    assert saekit.load(tmp_path / "fresh").trained_on is None
    (tmp_path / "fresh" / "config.json").write_text('{"model": "gpt2"}')
    assert saekit.load(tmp_path / "fresh").trained_on == TrainedOn("gpt2", None)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("gpt2", "gpt2", True),
        ("gpt2", "openai-community/gpt2", True),
        ("EleutherAI/pythia-70m", "eleutherai/pythia-70m", True),
        ("EleutherAI/pythia-70m", "someone/pythia-70m", False),
        ("EleutherAI/pythia-70m", "EleutherAI/pythia-160m", False),
        ("EleutherAI/pythia-70m", "/old/place/pythia-70m/", True),
        ("EleutherAI/pythia-70m", "/cache/models--EleutherAI--pythia-70m/snapshots/1f2e", True),
        ("/old/place/model", "/new/place/model", True),
        ("/old/place/model", "/old/place/other", False),
    ],
)
def test_names_of_one_model(one, other, same):
    assert same_model(one, other) == same
    assert same_model(other, one) == same


def test_folders_that_are_there_are_compared_as_such(tmp_path, monkeypatch):
    for name in ("a/model", "b/model"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not same_model("a/model", "b/model")
    assert same_model("a/model", str(tmp_path / "a" / "model"))
