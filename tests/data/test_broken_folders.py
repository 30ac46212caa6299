"""Folders of data that are there, and not whole: said so at once, and never taken for a data set on the hub."""

import json

import pytest
from datasets import Dataset, DatasetDict

from saekit import UserError
from saekit.config import DataConfig
from saekit.data import load_sequences


@pytest.fixture
def saved(tmp_path):
    """A folder made by save_to_disk, of tokens."""
    Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8}).save_to_disk(tmp_path / "d")
    return tmp_path / "d"


def refused(folder):
    with pytest.raises(UserError, match=rf"^data set '{folder}'") as error:
        load_sequences(DataConfig(str(folder)), None, 4)
    assert "hub" not in str(error.value).lower()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_one(saved):
    assert len(load_sequences(DataConfig(str(saved)), None, 4)) == 8


def test_rows_that_are_missing(saved):
    (file,) = saved.glob("*.arrow")
    file.unlink()
    assert file.name in refused(saved)


@pytest.mark.parametrize("size", [0, 10, -40])
def test_rows_that_are_cut_short(saved, size):
    (file,) = saved.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:size])
    refused(saved)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"_data_files": []}'])
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_descriptions_that_are_damaged(saved, name, text):
    (saved / name).write_text(text)
    if name == "dataset_info.json" and text.endswith("}"):  # everything in it may be left out
        load_sequences(DataConfig(str(saved)), None, 4)
    else:
        refused(saved)


def test_splits_that_are_missing(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8})
    DatasetDict(train=rows).save_to_disk(tmp_path / "d")
    (tmp_path / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert "test" in refused(tmp_path / "d")
    (tmp_path / "d" / "dataset_dict.json").write_text("{}")
    refused(tmp_path / "d")


@pytest.mark.parametrize("names", [[], ["notes.foo"]])
def test_nothing_to_read(tmp_path, names):
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / "d" / name).write_text("x")
    refused(tmp_path / "d")
    assert "no file or folder matches that pattern" in refused_pattern(tmp_path / "d" / "*.jsonl")


def refused_pattern(pattern):
    with pytest.raises(UserError, match="data set") as error:
        load_sequences(DataConfig(str(pattern)), None, 4)
    return str(error.value)
