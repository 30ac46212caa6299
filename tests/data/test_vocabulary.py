"""Ids of a pre-tokenized data set are compared with the vocabulary before anything is read."""

import numpy as np
import pytest
from datasets import Dataset, Features, LargeList, List, Value

from saekit import UserError
from saekit.data import check_tokens, sequences
from saekit.data.held_out import shuffled

KINDS = [List(Value("int32"), length=4), List(Value("int64")), LargeList(Value("int64")), List(Value("uint16"))]


def rows(foreign=None, count=3000):
    """Sequences `[n, n, n, n]` of 4, n below 100, but for one id."""
    found = np.repeat(np.arange(count) % 100, 4).reshape(count, 4)
    if foreign is not None:
        sequence, offset, token_id = foreign
        found[sequence, offset] = token_id
    return found.tolist()


@pytest.mark.parametrize("feature", KINDS, ids=str)
def test_the_first_foreign_id_is_named(feature, monkeypatch):
    monkeypatch.setattr("saekit.data.batches.CHUNK", 400)  # several parts of such few rows
    features = Features({"input_ids": feature})
    good = sequences(Dataset.from_dict({"input_ids": rows()}, features=features))
    check_tokens(good, 100)
    bad = sequences(Dataset.from_dict({"input_ids": rows((2345, 2, 100))}, features=features))
    with pytest.raises(
        UserError, match=r"^the data set has token id 100 at token 2 of sequence 2,345 .*vocabulary has 100 tok"
    ):
        check_tokens(bad, 100)
    check_tokens(bad, 101)


def test_only_what_is_read_is_looked_at():
    data = sequences(Dataset.from_dict({"input_ids": rows((2345, 2, 100))}))
    order = np.random.default_rng(0).permutation(3000)
    check_tokens(data, 100, order[order != 2345])
    with pytest.raises(UserError, match="sequence 2,345"):
        check_tokens(data, 100, order)
    with pytest.raises(UserError, match=r"^that has token id 100 at token 2 of sequence 2,345"):
        check_tokens(shuffled(shuffled(data, 12_000, seed=1), 12_000), 100, what="that")
    with pytest.raises(UserError, match="sequence 2,345"):
        check_tokens(data, 100, np.array([2999, 2345, 7]))


def test_rows_in_another_order():
    data = sequences(Dataset.from_dict({"input_ids": rows((2345, 2, 100))}).select([7, 2345, 3]))
    with pytest.raises(UserError, match="token 2 of sequence 1 "):
        check_tokens(data, 100)


@pytest.mark.parametrize(("token_id", "named"), [(-3, "token id -3"), (None, "a token without an id")])
def test_ids_that_are_none(token_id, named):
    ids = rows()
    ids[17][1] = token_id
    with pytest.raises(UserError, match=f"has {named} at token 1 of sequence 17 "):
        check_tokens(sequences(Dataset.from_dict({"input_ids": ids})), 100)


def test_rows_that_are_joined_and_cut():
    data = sequences(Dataset.from_dict({"input_ids": [[1, 2, 3], [4], [5, 600], [7, 8]]}), 4)
    with pytest.raises(UserError, match="token id 600 at token 1 of sequence 1 "):
        check_tokens(data, 600)


def test_sequences_of_a_caller_are_left_to_the_loop():
    class Own:
        ctx_len = 4

        def __len__(self):
            return 10

    check_tokens(Own(), 10)
