"""A look at the first rows tells what the whole would, for every kind of source."""

import gc

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from saekit import UserError
from saekit.config import DataConfig
from saekit.data import peek
from saekit.data.load import ROWS


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def look(tokenizer):
    return lambda dataset, **options: peek(DataConfig(str(dataset), **options), tokenizer)


@pytest.fixture
def rows(documents):
    return Dataset.from_dict({"text": documents, "id": list(range(len(documents)))})


# The library hands a CSV to pandas and leaves it open until it is collected.
@pytest.mark.filterwarnings("ignore:unclosed file .*t.csv:ResourceWarning")
def test_files(tmp_path, look, rows, documents):
    rows.to_json(tmp_path / "t.jsonl")
    rows.to_parquet(tmp_path / "t.parquet")
    rows.to_csv(tmp_path / "t.csv")
    for name in ("t.jsonl", "t.parquet", "t.csv", "*.jsonl"):
        found = look(tmp_path / name, split="train[:1%]")
        assert (found.columns, found.text_columns, found.count) == (("text", "id"), ("text",), None), name
        assert [row["text"] for row in found.first] == documents[:ROWS]
        assert not found.tokenized
    gc.collect()


def test_a_text_file_is_one_row(tmp_path, look):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    found = look(tmp_path / "a.txt")
    assert found.first == ({"text": "one\ntwo\n"},)


def test_folders_know_how_many_rows_they_have(tmp_path, look, rows):
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows.select(range(3)), test=rows).save_to_disk(tmp_path / "two")
    assert look(tmp_path / "one").count == look(tmp_path / "two", split="test").count == len(rows)
    assert len(look(tmp_path / "two").first) == 3
    with pytest.raises(UserError, match="no such split; the data set has train, test"):
        look(tmp_path / "two", split="dev")


def test_token_ids(tmp_path, look):
    Dataset.from_dict({"input_ids": [[1, 2], [3]]}).save_to_disk(tmp_path / "ids")
    found = look(tmp_path / "ids")
    assert found.tokenized
    assert found.first == ({"input_ids": [1, 2]}, {"input_ids": [3]})
    np.arange(5000, dtype=np.uint32).tofile(tmp_path / "ids.bin")
    found = look(tmp_path / "ids.bin", data_args={"dtype": "uint32"})
    assert found.tokenized
    assert found.first[0]["input_ids"] == list(range(len(found.first[0]["input_ids"])))


def test_options_that_a_stream_cannot_have(tmp_path, look, rows, documents, monkeypatch):
    """Online and offline alike: no hub is asked for a file."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    rows.to_json(tmp_path / "t.jsonl")
    found = look(tmp_path / "t.jsonl", data_args={"num_proc": 2})
    assert [row["text"] for row in found.first] == documents[:ROWS]


def test_what_cannot_be_streamed_is_read_whole(tmp_path, look, rows, monkeypatch):
    import datasets

    load = datasets.load_dataset

    def refuses_streams(*args, streaming=False, **options):
        if streaming:
            raise NotImplementedError("this archive cannot be streamed")
        return load(*args, **options)

    monkeypatch.setattr("datasets.load_dataset", refuses_streams)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    rows.to_json(tmp_path / "t.jsonl")
    found = look(tmp_path / "t.jsonl")
    assert (len(found.first), found.count) == (min(ROWS, len(rows)), len(rows))


def test_nothing_is_written_to_the_cache(tmp_path, look, rows, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows.to_json(tmp_path / "t.jsonl")
    look(tmp_path / "t.jsonl")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("empty.jsonl", b"", "empty"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl"),
        ("x.parquet", b"not parquet", "x.parquet"),
        ("odd.bin", b"123", "not a whole number of uint16 token ids"),
    ],
)
def test_what_cannot_be_read_is_a_line(tmp_path, look, name, content, part):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=part) as refused:
        look(tmp_path / name)
    assert "\n" not in str(refused.value)
