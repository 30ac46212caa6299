"""Packing against plain Python."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from saekit import UserError
from saekit.data import chunk_and_tokenize


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def stream_of(documents, tokenizer):
    """EOS before every document, the first included."""
    return [
        token
        for document in documents
        for token in [tokenizer.eos_token_id, *tokenizer(document, add_special_tokens=False)["input_ids"]]
    ]


@pytest.mark.parametrize("ctx_len", [7, 32, 64])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_nothing_is_lost_between_batches(documents, tokenizer, ctx_len, num_proc, monkeypatch):
    monkeypatch.setattr("saekit.data.pack.DOCUMENTS_PER_PROCESS", 100)
    data = Dataset.from_dict({"text": documents, "other": documents})
    packed = chunk_and_tokenize(data, tokenizer, max_seq_len=ctx_len, num_proc=num_proc)
    assert packed.column_names == ["input_ids"]
    rows = packed[:]["input_ids"]
    expected = stream_of(documents, tokenizer)
    assert rows.shape == (len(expected) // ctx_len, ctx_len)
    assert rows.flatten().tolist() == expected[: rows.numel()]


def test_a_document_longer_than_the_models_limit_is_kept_whole(tokenizer):
    long = "abcdefghij" * 50
    packed = chunk_and_tokenize(Dataset.from_dict({"text": [long, "x"]}), tokenizer)
    assert packed[:]["input_ids"].shape[1] == 64  # the tokenizer's limit, below 2048
    text = tokenizer.decode(packed[:]["input_ids"].flatten())
    assert text.startswith("<|end|>" + long[:440])


def test_the_second_time_comes_from_the_cache(text_file, tokenizer, monkeypatch):
    from datasets import load_dataset

    data = load_dataset("json", data_files=str(text_file), split="train")
    first = chunk_and_tokenize(data, tokenizer, max_seq_len=16)
    tokenizer("another text changes nothing", truncation=True, max_length=4)

    def no_work(*args, **kwargs):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(type(tokenizer), "__call__", no_work)
    again = chunk_and_tokenize(data, tokenizer, max_seq_len=16)
    assert again.cache_files == first.cache_files


def test_missing_text_counts_as_empty(tokenizer):
    packed = chunk_and_tokenize(Dataset.from_dict({"text": ["ab", None, "cd"]}), tokenizer, max_seq_len=2)
    assert tokenizer.decode(packed[:]["input_ids"].flatten()) == "<|end|>ab<|end|><|end|>c"


def test_separator_of_an_encoder_and_none_at_all(tokenizer, model_dir):
    encoder = AutoTokenizer.from_pretrained(model_dir, eos_token=None, bos_token=None, sep_token="b")
    encoder.eos_token = encoder.bos_token = None
    packed = chunk_and_tokenize(Dataset.from_dict({"text": ["xy"]}), encoder, max_seq_len=3)
    assert packed[0]["input_ids"][0] == encoder.sep_token_id
    encoder.sep_token = None
    with pytest.raises(UserError, match="no EOS, SEP or BOS"):
        chunk_and_tokenize(Dataset.from_dict({"text": ["xy"]}), encoder, max_seq_len=3)
