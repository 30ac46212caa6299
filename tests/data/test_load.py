"""Every kind of source gives the same tokens."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoTokenizer

from saekit import UserError
from saekit.config import DataConfig
from saekit.data import load_sequences, sequences

CTX_LEN = 16


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def tokens_of(tokenizer, dataset, **options):
    data = load_sequences(DataConfig(str(dataset), **options), tokenizer, CTX_LEN)
    assert data.ctx_len == CTX_LEN
    return data.read(np.arange(len(data)))


@pytest.fixture(scope="module")
def expected(text_file, tokenizer):
    return tokens_of(tokenizer, text_file)


@pytest.fixture
def rows(documents):
    return Dataset.from_dict({"text": documents})


def test_parquet_and_folders(tmp_path, tokenizer, rows, expected):
    rows.to_parquet(tmp_path / "t.parquet")
    assert tokens_of(tokenizer, tmp_path / "t.parquet").equal(expected)
    rows.save_to_disk(tmp_path / "set")
    assert tokens_of(tokenizer, tmp_path / "set").equal(expected)
    DatasetDict(train=rows.select(range(3)), test=rows).save_to_disk(tmp_path / "splits")
    assert tokens_of(tokenizer, tmp_path / "splits", split="test").equal(expected)
    with pytest.raises(UserError, match=r"--split 'nosuch'.*train, test"):
        tokens_of(tokenizer, tmp_path / "splits", split="nosuch")


def test_several_files_in_the_order_of_their_names(tmp_path, tokenizer, rows, expected):
    for number in range(3):
        rows.select(range(number * 400, number * 400 + 400)).to_json(tmp_path / f"part{number}.jsonl")
    assert tokens_of(tokenizer, tmp_path / "*.jsonl").equal(expected)
    assert tokens_of(tokenizer, tmp_path / "part*").equal(expected)


def test_a_text_file_is_one_document(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree is a longer line\n")
    (tmp_path / "b.txt").write_text("four five six seven eight nine ten")
    text = tokenizer.decode(tokens_of(tokenizer, tmp_path / "*.txt").flatten())
    whole = "<|end|>one\ntwo\n\nthree is a longer line\n<|end|>four five six seven eight nine ten"
    assert whole.startswith(text)
    assert len(text) > 40


def test_columns_splits_and_limits(tmp_path, tokenizer, rows, expected):
    rows.rename_column("text", "body").to_json(tmp_path / "t.jsonl")
    assert tokens_of(tokenizer, tmp_path / "t.jsonl", text_column="body").equal(expected)
    some = tokens_of(tokenizer, tmp_path / "t.jsonl", text_column="body", split="train[:100]")
    assert some.equal(tokens_of(tokenizer, tmp_path / "t.jsonl", text_column="body", max_examples=100))
    assert some.equal(expected[: len(some)])
    assert 0 < len(some) < len(expected)


def test_streaming_takes_what_was_asked_for(text_file, tokenizer, expected):
    some = tokens_of(tokenizer, text_file, data_args="streaming=true", max_examples=100)
    assert some.equal(expected[: len(some)])
    assert some.equal(tokens_of(tokenizer, text_file, max_examples=100))


@pytest.mark.parametrize("length", [CTX_LEN, 10, 48])
def test_pretokenized_rows_of_any_length(tmp_path, tokenizer, expected, length):
    flat = expected.flatten().tolist()
    whole = len(flat) // length * length
    Dataset.from_dict({"input_ids": [flat[i : i + length] for i in range(0, whole, length)]}).save_to_disk(
        tmp_path / "s"
    )
    found = tokens_of(tokenizer, tmp_path / "s")
    assert found.equal(expected[: len(found)])
    assert len(found) == whole // CTX_LEN


def test_pretokenized_rows_of_unequal_lengths():
    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 6, 7, 8], [9]]})
    assert sequences(data).read(np.arange(3)).tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert sequences(data, 4).read(np.arange(2)).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_bin_files(tmp_path, tokenizer, expected, dtype):
    expected.numpy().astype(dtype).tofile(tmp_path / "t.bin")
    found = tokens_of(tokenizer, tmp_path / "t.bin", data_args={"dtype": dtype})
    assert found.equal(expected)


def test_a_bin_file_of_the_other_type_is_noticed(tmp_path, tokenizer):
    np.arange(33, dtype="uint16").tofile(tmp_path / "t.bin")
    with pytest.raises(UserError, match="not a whole number of uint32"):
        tokens_of(tokenizer, tmp_path / "t.bin", data_args="dtype=uint32")


def test_not_tokenized():
    with pytest.raises(UserError, match="columns text, but no input_ids"):
        sequences(Dataset.from_dict({"text": ["a"]}))


def test_the_library_raises_what_we_expect_offline():
    """If this changes, the one-line error of an unknown data set has to follow."""
    with pytest.raises((ConnectionError, FileNotFoundError)):
        load_dataset("someone/no-such-data")


def test_padded_rows_are_refused():
    rows = {"input_ids": [[1, 2], [3, 0]], "attention_mask": [[1, 1], [1, 0]]}
    with pytest.raises(UserError, match="padded rows"):
        sequences(Dataset.from_dict(rows))
    assert len(sequences(Dataset.from_dict({**rows, "attention_mask": [[1, 1], [1, 1]]}))) == 2


def test_a_bin_file_that_could_be_either_type_needs_to_be_told(tmp_path, tokenizer, monkeypatch):
    np.arange(64, dtype="uint32").tofile(tmp_path / "t.bin")
    with pytest.raises(UserError, match="--max-examples 3"):
        tokens_of(tokenizer, tmp_path / "t.bin", max_examples=3)
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 2**17)
    with pytest.raises(UserError, match="--data-args dtype=uint32"):
        tokens_of(tokenizer, tmp_path / "t.bin")
    assert tokens_of(tokenizer, tmp_path / "t.bin", data_args="dtype=uint32").flatten().tolist() == list(range(64))
