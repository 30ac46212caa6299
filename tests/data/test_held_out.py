"""Documents that a run did not read."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from saekit import UserError
from saekit.activations import load_tokenizer
from saekit.config import DataConfig, ModelConfig
from saekit.data import StepBatches, load_sequences
from saekit.data.held_out import held_out, other_split, shuffled, touched
from saekit.data.load import load_rows
from saekit.data.pack import tokenize

CTX_LEN = 16


def test_touched_by_hand():
    # Sequences of 4:  a a a b | b b b b | b c c d | d d
    lengths = np.array([3, 6, 2, 0, 3])
    for seen, expected in {
        (): [False] * 5,
        (0,): [True, True, False, False, False],
        (1,): [False, True, False, False, False],
        (2,): [False, True, True, False, True],
        (7,): [False] * 5,  # there is none of that number
    }.items():
        assert touched(lengths, 4, np.array(seen, dtype=np.int64)).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_touched_is_what_counting_tokens_says(seed):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 12, 50)
    document_of = np.repeat(np.arange(50), lengths)
    count = len(document_of) // 7
    seen = draw.choice(count, count // 3, replace=False)
    expected = np.zeros(50, dtype=bool)
    for number in seen:
        expected[document_of[number * 7 : (number + 1) * 7]] = True
    assert np.array_equal(touched(lengths, 7, seen), expected)


@pytest.fixture
def tokenizer(model_dir):
    return load_tokenizer(ModelConfig(model=str(model_dir)))


def strings(data, tokenizer):
    """Documents between separators, as far as the rows hold whole ones."""
    stream = torch.cat(list(data.read(np.arange(len(data))))).tolist()
    text = tokenizer.decode(stream, clean_up_tokenization_spaces=False)
    return text.split("<|end|>")


def test_no_word_of_what_was_trained_on(tmp_path, tokenizer):
    draw = np.random.default_rng(0)
    documents = ["".join(draw.choice(list("abcdefghij"), draw.integers(10, 40))) for _ in range(1200)]
    Dataset.from_dict({"text": documents}).to_json(tmp_path / "text.jsonl")
    cfg = DataConfig(dataset=str(tmp_path / "text.jsonl"))
    whole = load_sequences(cfg, tokenizer, CTX_LEN)
    seen = StepBatches(whole, 4, seed=42, max_tokens=CTX_LEN * 300).order
    trained = {row.tobytes() for row in whole.read(seen).numpy()}
    data = held_out(cfg, tokenizer, CTX_LEN, seen)
    assert 100 < len(data) < len(whole) - len(seen)
    assert data.read(np.array([0, 3])).shape == (2, CTX_LEN)
    assert not trained & {row.tobytes() for row in data.read(np.arange(len(data))).numpy()}
    # Documents come whole and in order: each is one of the data set's, after those before it.
    position = 0
    for text in strings(data, tokenizer)[1:-1]:
        position = documents.index(text, position) + 1


def test_what_is_left_of_tokens_without_documents(tmp_path, tokenizer):
    rows = torch.randint(1, 200, (40, CTX_LEN))
    Dataset.from_dict({"input_ids": rows.tolist()}).save_to_disk(tmp_path / "rows")
    rows.numpy().astype(np.uint16).tofile(tmp_path / "ids.bin")
    seen = np.array([0, 5, 39])
    left = np.setdiff1d(np.arange(40), seen)
    for name in ("rows", "ids.bin"):
        data = held_out(DataConfig(dataset=str(tmp_path / name)), tokenizer, CTX_LEN, seen)
        assert torch.equal(data.read(np.arange(len(data))), rows[left])


@pytest.fixture
def doubled(tmp_path):
    """500 documents, of which the last 100 are the first 100 once more."""
    draw = np.random.default_rng(1)
    texts = ["".join(draw.choice(list("abcdefghij"), draw.integers(10, 40))) for _ in range(400)]
    Dataset.from_dict({"text": texts + texts[:100]}).to_json(tmp_path / "text.jsonl")
    return str(tmp_path / "text.jsonl")


@pytest.mark.parametrize("split", ["train", "train[50%:]", "train[:60%]", "train[80%:]+train[30%:40%]"])
def test_of_another_split_only_what_the_run_did_not_read(doubled, tokenizer, split):
    trained = DataConfig(dataset=doubled, split="train[:50%]")
    whole = load_sequences(trained, tokenizer, CTX_LEN)
    seen = StepBatches(whole, 4, seed=42, max_tokens=CTX_LEN * 60).order
    rows = [tuple(row) for row in load_rows_of(doubled, "train[:50%]", tokenizer)]
    ends = np.cumsum([len(row) for row in rows])
    read = {
        row
        for row, end in zip(rows, ends, strict=True)
        if set(range((end - len(row)) // CTX_LEN, (end - 1) // CTX_LEN + 1)) & set(seen.tolist())
    }
    wanted = [row for row in load_rows_of(doubled, split, tokenizer) if tuple(row) not in read]
    stream = np.concatenate([np.array(row) for row in wanted])
    data = other_split(DataConfig(dataset=doubled, split=split), trained, tokenizer, CTX_LEN, seen)
    assert data.read(np.arange(len(data))).flatten().tolist() == stream[: len(data) * CTX_LEN].tolist()
    assert len(data) == len(stream) // CTX_LEN


def load_rows_of(dataset, split, tokenizer):
    rows = tokenize(load_rows(DataConfig(dataset=dataset, split=split)), tokenizer)
    return rows.with_format(None)["input_ids"]


def test_nothing_left_of_another_split(doubled, tokenizer):
    trained = DataConfig(dataset=doubled, split="train[:50%]")
    seen = np.arange(len(load_sequences(trained, tokenizer, CTX_LEN)))
    again = DataConfig(dataset=doubled, split="train[80%:]")  # the same documents as the first fifth
    with pytest.raises(UserError, match=r"train\[80%:\].* unread, so too little is held out"):
        other_split(again, trained, tokenizer, CTX_LEN, seen)


def test_another_split_of_rows_without_documents(tmp_path, tokenizer):
    rows = torch.randint(1, 200, (40, CTX_LEN))
    Dataset.from_dict({"input_ids": rows.tolist()}).save_to_disk(tmp_path / "rows")
    rows.numpy().astype(np.uint16).tofile(tmp_path / "ids.bin")
    seen = np.array([0, 5, 9])
    trained = DataConfig(dataset=str(tmp_path / "rows"), split="train[:25%]")
    data = other_split(DataConfig(dataset=str(tmp_path / "rows")), trained, tokenizer, CTX_LEN, seen)
    left = rows[np.setdiff1d(np.arange(40), seen)]
    assert torch.equal(data.read(np.arange(len(data))), left)
    flat = DataConfig(dataset=str(tmp_path / "ids.bin"))
    data = other_split(flat, flat, tokenizer, CTX_LEN, seen)
    assert torch.equal(data.read(np.arange(len(data))), left)


@pytest.mark.parametrize("ctx_len", [CTX_LEN, 1024])
def test_nothing_left(text_file, tokenizer, ctx_len):
    cfg = DataConfig(dataset=str(text_file))
    seen = np.arange(len(load_sequences(cfg, tokenizer, ctx_len)))
    with pytest.raises(UserError, match="too little is held out"):
        held_out(cfg, tokenizer, ctx_len, seen)


def test_a_sample_comes_from_everywhere_and_is_the_same_every_time(text_file, tokenizer):
    whole = load_sequences(DataConfig(dataset=str(text_file)), tokenizer, CTX_LEN)
    some = shuffled(whole, max_tokens=CTX_LEN * 20 + 3)
    assert len(some) == 20
    again = shuffled(whole, max_tokens=CTX_LEN * 20)
    assert torch.equal(some.read(np.arange(20)), again.read(np.arange(20)))
    assert some.numbers.max() > len(whole) / 2
    assert len(set(some.numbers)) == 20
    assert len(shuffled(whole, max_tokens=1)) == 1
    assert some.read(np.arange(0)).shape == (0, CTX_LEN)
