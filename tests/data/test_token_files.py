"""A `.bin` file of another type than it is said to have is refused; an honest one never is."""

import gzip

import numpy as np
import pytest

from saekit import UserError
from saekit.config import DataConfig
from saekit.data import check_tokens, load_sequences
from saekit.data.token_files import TYPES

CTX_LEN = 16


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ids.bin"


def opened(file, vocabulary, ids=None, really="uint16", **arguments):
    """The sequences of a file, checked as a run checks them."""
    if ids is not None:
        np.asarray(ids).astype(TYPES[really]).tofile(file)
    data = load_sequences(DataConfig(str(file), data_args=arguments), None, CTX_LEN)
    check_tokens(data, vocabulary)
    return data


def random_ids(vocabulary, count=4000):
    return np.random.default_rng(0).integers(0, vocabulary, count)


@pytest.mark.parametrize("vocabulary", [40, 257, 50_257, 65_536, 128_000, 262_144])
@pytest.mark.parametrize("said", TYPES)
@pytest.mark.parametrize("really", ["uint16", "uint32", "int64"])
def test_every_type_read_as_every_other(file, vocabulary, really, said):
    ids = random_ids(min(vocabulary, 2**16) if really == "uint16" else vocabulary)
    if said in (really, really.replace("uint", "int")):
        data = opened(file, vocabulary, ids, really, dtype=said)
        assert data.read(np.arange(len(data))).flatten().tolist() == ids.tolist()
        return
    with pytest.raises(UserError, match=rf"looks like {really}.*--data-args dtype={really}") as refused:
        opened(file, vocabulary, ids, really, dtype=said)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("really", ["uint32", "int64"])
def test_the_usual_type_is_not_taken_for_granted(file, really):
    with pytest.raises(UserError, match=f"looks like {really}, but is read as uint16"):
        opened(file, 50_257, random_ids(50_257), really)


def test_few_different_ids_are_not_the_upper_parts_of_others(file):
    """Every second one could be one, in so large a vocabulary; but none of the others is too large for one."""
    ids = random_ids(4)
    assert (
        opened(file, 262_144, ids, dtype="uint16").read(np.arange(4)).flatten().tolist() == ids[: 4 * CTX_LEN].tolist()
    )


def padded(ids, length):
    """Documents of different lengths, each filled up with zeros."""
    rows = np.zeros((100, length), dtype=np.int64)
    for row, count in zip(rows, np.random.default_rng(1).integers(1, length, 100), strict=True):
        row[:count] = ids[:count] + 1
    return rows.flatten()


@pytest.mark.parametrize("said", TYPES)
@pytest.mark.parametrize("vocabulary", [2, 200, 257, 50_257, 65_536, 262_144])
@pytest.mark.parametrize(
    "make",
    [
        lambda ids: np.zeros(4000),
        lambda ids: padded(ids - (ids == ids.max()), 33),
        lambda ids: np.where(np.arange(4000) % 7 == 0, ids, 0),
        lambda ids: np.concatenate([np.zeros(3000), ids[:1000]]),
        lambda ids: np.tile([1, 0], 2000),  # every second id is zero, and the others are one
        lambda ids: np.minimum(ids, 1),
        lambda ids: ids[:33],
        lambda ids: np.full(4000, ids.max()),
    ],
    ids=["zeros", "padded", "sparse", "zeros first", "every second", "zeros and ones", "few", "one id"],
)
def test_an_honest_file_is_never_refused(file, vocabulary, said, make):
    ids = make(random_ids(min(vocabulary, 2**16) if said == "uint16" else vocabulary))
    data = opened(file, vocabulary, ids, said, dtype=said)
    assert data.read(np.arange(len(data))).flatten().tolist() == ids[: len(data) * CTX_LEN].tolist()


def test_a_user_who_knows_better(file):
    ids = np.stack([random_ids(200), np.zeros(4000)], axis=1).flatten()
    with pytest.raises(UserError, match="dtype=uint16,check_type=false if it really is uint16"):
        opened(file, 200, ids)
    data = opened(file, 200, dtype="uint16", check_type=False)
    assert data.read(np.arange(len(data))).flatten().tolist() == ids.tolist()


def test_the_first_foreign_id_is_named(file):
    ids = random_ids(50_000)
    ids[[777, 2000]] = 50_500, 51_000
    with pytest.raises(
        UserError, match=r"token id 50,500 at token 9 of sequence 48 .*vocabulary has 50,257 tokens: it was"
    ):
        opened(file, 50_257, ids)
    with pytest.raises(UserError, match=r"token id -7 at token 3 of sequence 0 "):
        opened(file, 50_257, np.where(np.arange(4000) == 3, -7, ids), "int32", dtype="int32")


def test_only_what_a_run_reads_is_looked_at(file):
    ids = random_ids(50_000)
    ids[777] = 50_500
    ids.astype("<u2").tofile(file)
    data = load_sequences(DataConfig(str(file)), None, CTX_LEN)
    check_tokens(data, 50_257, np.array([49, 3, 47, 0]))
    with pytest.raises(UserError, match="sequence 48"):
        check_tokens(data, 50_257, np.array([49, 48, 0]))


def test_a_file_is_looked_through_once(file, monkeypatch):
    data = opened(file, 50_257, random_ids(50_257))
    monkeypatch.setattr(type(data), "first_foreign", lambda *_: pytest.fail("looked through again"))
    check_tokens(data, 50_257)
    with pytest.raises(pytest.fail.Exception):
        check_tokens(data, 50_258)


def test_without_a_tokenizer_the_model_says_that_the_type_must_be_told(file):
    with pytest.raises(UserError, match=r"vocabulary has 128,000 tokens, .* dtype=uint32"):
        opened(file, 128_000, random_ids(60_000))
    opened(file, 128_000, dtype="uint16")


@pytest.mark.parametrize(
    ("size", "said", "part"),
    [
        (66, "uint32", "66 bytes is not a whole number of uint32 token ids, but of uint16: use .*dtype=uint16"),
        (68, "int64", "not a whole number of int64 token ids, but of uint32 or uint16"),
        (67, "uint16", "not a whole number of uint16 token ids: it is cut off"),
        (64, "uint8", "dtype=uint8: expected one of uint16, uint32, int32, int64"),
        (0, "uint16", "less than one sequence"),
    ],
)
def test_sizes_and_types_that_are_not_possible(file, size, said, part):
    file.write_bytes(bytes(size))
    with pytest.raises(UserError, match=part):
        opened(file, 257, dtype=said)


def test_an_argument_that_a_bin_file_does_not_have(file):
    with pytest.raises(UserError, match=r"--data-args typ=\.\.\.: a \.bin file takes only dtype and check_type"):
        opened(file, 257, random_ids(257), typ="uint32")


def numpy_file(file, ids):
    with file.open("wb") as out:
        np.save(out, ids)


def llm_c_file(file, ids):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    file.write_bytes(header.tobytes() + ids.tobytes())


def zip_file(file, ids):
    with file.open("wb") as out:
        np.savez(out, ids)


@pytest.mark.parametrize(
    ("write", "part"),
    [
        (numpy_file, "NumPy array"),
        (zip_file, "zip archive"),
        (llm_c_file, r"header of 1024 bytes, as llm\.c writes \(cut it off: tail -c \+1025\)"),
        (lambda file, ids: file.write_bytes(gzip.compress(ids.tobytes())), "compressed"),
        (lambda file, ids: file.write_text("Some text – that has been given\na wrong name.\n" * 50, "utf-8"), "text"),
        (lambda file, ids: file.write_text('{"text": "one", "id": 1}\n' * 50), "text"),
    ],
    ids=["npy", "npz", "llm.c", "gzip", "txt", "jsonl"],
)
def test_other_content_is_named(file, write, part):
    write(file, random_ids(50_257).astype("<u2"))
    with pytest.raises(UserError, match=rf"{file.name} contains .*{part}"):
        opened(file, 50_257)


def test_parquet_is_named(file):
    from datasets import Dataset

    Dataset.from_dict({"input_ids": [[1] * 16] * 100}).to_parquet(file)
    with pytest.raises(UserError, match="contains a parquet file"):
        opened(file, 50_257)


def test_a_glob_of_bin_files(tmp_path, file):
    opened(file, 257, random_ids(257))
    with pytest.raises(UserError, match=r"pass one \.bin file, not a glob"):
        opened(tmp_path / "*.bin", 257)
    with pytest.raises(UserError, match=r"folder with \.bin files: pass one"):
        opened(tmp_path, 257)
