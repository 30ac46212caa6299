"""Data sets that are nearly what is expected."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value
from transformers import AutoTokenizer

from saekit import UserError
from saekit.config import DataConfig
from saekit.data import load_sequences, sequences
from tests.data.test_load import tokens_of


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.mark.parametrize("split", ["train[:25%]", "train[:300]", "train[0:100]+train[100:300]"])
def test_slices_of_a_saved_folder(tmp_path, tokenizer, documents, text_file, split):
    rows = Dataset.from_dict({"text": documents})
    DatasetDict(train=rows, test=rows.select(range(5))).save_to_disk(tmp_path / "splits")
    rows.save_to_disk(tmp_path / "set")
    expected = tokens_of(tokenizer, text_file, max_examples=300)
    assert tokens_of(tokenizer, tmp_path / "splits", split=split).equal(expected)
    assert tokens_of(tokenizer, tmp_path / "set", split=split).equal(expected)
    assert tokens_of(tokenizer, text_file, split=split).equal(expected)


@pytest.mark.parametrize("split", ["nosuch[:3]", "train[:x]", ""])
def test_splits_that_are_not_there(tmp_path, tokenizer, documents, split):
    rows = Dataset.from_dict({"text": documents})
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match=r"--split '.*train, test"):
        tokens_of(tokenizer, tmp_path / "splits", split=split)


def test_a_name_that_looks_like_a_glob(tmp_path, tokenizer, text_file):
    (tmp_path / "text[1].jsonl").write_bytes(text_file.read_bytes())
    expected = tokens_of(tokenizer, text_file)
    assert tokens_of(tokenizer, tmp_path / "text[1].jsonl").equal(expected)


def test_a_column_that_is_no_text(tokenizer, text_file):
    with pytest.raises(UserError, match="--text-column 'id' contains int64, not text"):
        tokens_of(tokenizer, text_file, text_column="id")


@pytest.mark.parametrize(
    ("rows", "holds"),
    [([1, 2], "int"), (["a", "b"], "string"), ([["a"], ["b"]], "string"), ([[0.5], [1.5]], "float64")],
)
def test_a_column_that_holds_no_tokens(rows, holds):
    with pytest.raises(UserError, match=f"input_ids.*{holds}"):
        sequences(Dataset.from_dict({"input_ids": rows}))


@pytest.mark.parametrize(
    "feature", [List(Value("int32"), length=4), LargeList(Value("int64")), List(Value("uint16"))], ids=str
)
@pytest.mark.parametrize("ctx_len", [4, 3])
def test_every_kind_of_list(feature, ctx_len):
    rows = [[number * 4 + i for i in range(4)] for number in range(6)]
    data = Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": feature}))
    found = sequences(data, ctx_len).read(np.arange(24 // ctx_len))
    assert found.flatten().tolist() == list(range(24))


def test_a_row_without_tokens_is_skipped():
    data = Dataset.from_dict({"input_ids": [[1, 2], None, [3, 4], None]})
    assert sequences(data, 2).read(np.arange(2)).tolist() == [[1, 2], [3, 4]]


def test_arguments_that_the_format_does_not_have(tokenizer, text_file):
    for given in ("nosuch=1", "data_files=nosuch.jsonl"):
        with pytest.raises(UserError, match=r"data set '.*text\.jsonl'|found neither"):
            tokens_of(tokenizer, text_file, data_args=given)


def test_the_columns_of_a_selection(tokenizer, documents):
    """Rows in another order, as `select` and `shuffle` leave them, not in the table's."""
    data = Dataset.from_dict({"input_ids": [[n, n] for n in range(10)]}).select([7, 2, 5])
    assert sequences(data).read(np.arange(3)).tolist() == [[7, 7], [2, 2], [5, 5]]
    assert sequences(data, 3).read(np.arange(2)).tolist() == [[7, 7, 2], [2, 5, 5]]


def test_the_numbers_of_a_bin_file_need_no_copy_of_it(tmp_path, tokenizer):
    np.arange(64, dtype="uint16").tofile(tmp_path / "t.bin")
    data = load_sequences(DataConfig(str(tmp_path / "t.bin")), tokenizer, 16)
    assert isinstance(data.rows, np.memmap)
    assert data.read(np.array([3, 0]))[:, 0].tolist() == [48, 0]
