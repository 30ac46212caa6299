"""Folders of language models that are nearly whole: what is wrong is named, by file, before anything is loaded."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from saekit import UserError
from saekit.model_files import check_model_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "model")


def refused(folder, *, weights=True):
    with pytest.raises(UserError, match=r"^model 'm' could not be loaded: ") as error:
        check_model_folder("m", folder, weights=weights)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix("model 'm' could not be loaded: ")


def test_a_whole_one(folder):
    check_model_folder("m", folder, weights=True)
    (folder / "model.safetensors").unlink()
    check_model_folder("m", folder, weights=False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "model.safetensors is empty"),
        (b"abc", "model.safetensors is truncated"),
        (b"\xff" * 40, "model.safetensors is damaged: it does not start"),
        (POINTER.encode(), "model.safetensors is a Git LFS pointer"),
        (-100, "model.safetensors is truncated: it has"),
        (500, "model.safetensors is truncated: it ends after 500 bytes, inside its header"),
        (b"\x02\0\0\0\0\0\0\0{}x", "model.safetensors is damaged: it has 11 bytes, but its header says 10"),
        (b"\x02\0\0\0\0\0\0\0{x", "model.safetensors is damaged: its header cannot be read"),
        (b'\x05\0\0\0\0\0\0\0{"a":', "model.safetensors is damaged: its header cannot be read"),
    ],
)
def test_weights(folder, content, says):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:content] if isinstance(content, int) else content)
    assert refused(folder).startswith(says)


def test_truncated_weights_say_how_much_is_there(folder):
    file = folder / "model.safetensors"
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(folder) == f"model.safetensors is truncated: it has {whole - 100:,} of {whole:,} bytes"


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "model.gguf")
    assert refused(folder).startswith("there are no weights in the folder (model.safetensors or pytorch_model.bin); ")
    assert "model.gguf" in refused(folder)


def test_parts(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / part)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: part for part, own in parts.items() for name in own}}))
    check_model_folder("m", folder, weights=True)
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-1])
    assert refused(folder).startswith("b.safetensors is truncated")
    (folder / "b.safetensors").unlink()
    assert refused(folder) == "b.safetensors is missing, but model.safetensors.index.json names it"
    for text, says in (
        ("{", "is damaged ("),
        ("[]", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
    ):
        index.write_text(text)
        assert says in refused(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "config.json is damaged ("), ("[]", "holds a list"), ("", "config.json is empty"), (POINTER, "Git LFS")],
)
def test_config(folder, text, says):
    (folder / "config.json").write_text(text)
    assert says in refused(folder, weights=False)


def test_no_config(folder, tmp_path):
    (folder / "config.json").unlink()
    assert refused(folder).startswith("there is no config.json in the folder; it has ")
    (folder / "adapter_config.json").touch()
    assert "adapter" in refused(folder)
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty") == "there is no config.json in the folder; it is empty"


def test_the_folder_below_is_suggested(model_dir, tmp_path):
    inner = shutil.copytree(model_dir, tmp_path / "hub" / "snapshots" / "abc")
    assert refused(tmp_path / "hub") == f"there is no config.json in the folder; did you mean {inner}?"
