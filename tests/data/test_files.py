"""Files by name, by glob and by folder are the same documents."""

import gzip
import os
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer

from saekit import UserError
from saekit.config import DataConfig
from saekit.data import load_sequences, peek
from saekit.data.files import ending, find_files
from saekit.data.load import load_rows

TEXTS = ["one\ntwo\n\nthree", "four – with a dash\n", "", "  five\r\nsix  ", "seven\n"]
"""Documents whose lines, spaces and ends are easily lost."""


def rows(dataset, **options):
    return load_rows(DataConfig(str(dataset), **options)).with_format(None)["text"]


def compress(content, ending):
    """The content under `.gz` or `.zst`, in two parts: readers that end after the first are not rare."""
    if ending == ".gz":
        return gzip.compress(content[: len(content) // 2]) + gzip.compress(content[len(content) // 2 :])
    parts = []
    for part in (content[: len(content) // 2], content[len(content) // 2 :]):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as out:
            out.write(part)
        parts.append(sink.getvalue().to_pybytes())
    return b"".join(parts)


def write(file, texts, compression=""):
    """One text file per document, or all in one file, by the file's ending."""
    kind = file.suffix
    if kind in (".txt", ".md"):
        for number, text in enumerate(texts):
            content = text.encode()
            one = file.with_name(f"{file.stem}{number}{kind}{compression}")
            one.write_bytes(compress(content, compression) if compression else content)
        return
    data = Dataset.from_dict({"text": texts})
    {".jsonl": data.to_json, ".parquet": data.to_parquet, ".csv": data.to_csv}[kind](file)
    if compression:
        file.with_name(file.name + compression).write_bytes(compress(file.read_bytes(), compression))
        file.unlink()


# The library hands a CSV to pandas and leaves it open until it is collected.
@pytest.mark.filterwarnings("ignore:unclosed file .*csv:ResourceWarning")
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".parquet", ".csv"])
def test_a_folder_a_glob_and_a_stream_are_the_same(tmp_path, kind, compression):
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [text.replace("\r", "") for text in TEXTS]
    if kind == ".csv":  # to which an empty text is a missing one
        texts = [text or "x" for text in texts]
    write(folder / f"a{kind}", texts, compression)
    write(folder / f"b{kind}", texts[:2], compression)
    for name in (folder, f"{folder}/", folder / "*", folder / f"*{kind}{compression}", folder / "**"):
        assert rows(name) == texts + texts[:2], name
    assert rows(folder, data_args="streaming=true", max_examples=6) == [*texts, texts[0]]
    found = peek(DataConfig(str(folder)), None)
    assert (found.columns, [row["text"] for row in found.first]) == (("text",), texts + texts[:2])


def test_files_below_and_beside(tmp_path):
    folder = tmp_path / "d[1]"
    for name in ("b.txt", "sub/a.txt", "sub/deep/c.TXT", ".hidden.txt", ".git/d.txt", "__pycache__/e.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for beside in ("README.md", "LICENSE", "dataset_info.json", ".gitattributes"):
        (folder / beside).write_text("{}")
    assert rows(folder) == ["b.txt", "sub/a.txt", "sub/deep/c.TXT"]


def test_a_readme_is_a_document_among_documents(tmp_path):
    for name in ("README.md", "a.md"):
        (tmp_path / name).write_text(name)
    assert rows(tmp_path) == rows(tmp_path / "*.md") == ["README.md", "a.md"]
    (tmp_path / "b.txt").write_text("b.txt")
    assert rows(tmp_path) == ["a.md", "b.txt"]


def test_a_file_that_changes_is_read_again(tmp_path):
    for number, compression in enumerate((".gz", ".zst")):
        for texts in (["one"], ["two", "three"]):
            file = tmp_path / "t.parquet"
            write(file, texts, compression)
            packed = tmp_path / f"t.parquet{compression}"
            os.utime(packed, (number, len(texts)))
            assert rows(packed) == texts


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.txt", "b.jsonl"], r"a\.txt and b\.jsonl have different formats: .*'.*/\*\.txt'"),
        (["a.txt", "b.pdf"], r"b\.pdf has an unknown format: pass files of one format"),
        (["a.jsonl.gz", "b.parquet"], r"a\.jsonl\.gz and b\.parquet have different formats"),
        (["a.txt", "a.txt.gz"], r"a\.txt and a\.txt\.gz are the same file, plain and compressed"),
        (["a.txt.gz", "a.txt.zst"], "are the same file, plain and compressed"),
        (["a.txt", "b.bin"], r"b\.bin has an unknown format: .*or one \.bin file, not compressed"),
    ],
)
def test_what_does_not_belong_together_is_named(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_text("x")
    for dataset in (tmp_path, tmp_path / "*"):
        with pytest.raises(UserError, match=says) as refused:
            rows(dataset)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "test.jsonl"],
        ["my-train-1.jsonl", "my-train-2.jsonl", "my_dev.jsonl"],
        ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl", "validation/c.jsonl"],
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/extra-00000-of-00001.jsonl"],
        ["a.jsonl", "latest.jsonl", "retrained.jsonl", "Test.jsonl"],
        ["training.jsonl", "x-eval.jsonl"],
    ],
    ids=lambda names: " ".join(names),
)
def test_splits_are_those_of_the_library(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": [name]}).to_json(tmp_path / name)
    theirs = load_dataset(str(tmp_path))
    found = find_files(str(tmp_path))
    assert set(found.by_split) == set(theirs)
    for split, data in theirs.items():
        assert sorted(rows(tmp_path, split=split)) == sorted(data["text"])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.txt", "the-test.txt"], r"by its name, a\.txt belongs to none of the splits \(test\)"),
        (["a.txt", "train of thought.txt"], r"a\.txt belongs to none .*\(train\).*pass the files to read as a glob"),
        (["train-test.txt", "train-1.txt"], r"train-test\.txt belongs to several"),
    ],
)
def test_names_that_leave_the_split_open(tmp_path, names, says):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=says):
        rows(tmp_path)
    assert len(rows(tmp_path / "**" / "*.txt")) == len(names)


def test_a_folder_that_describes_itself_is_read_as_it_says(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(f"{name}\n{name}\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.txt\n"
        "  - split: dev\n    path: [b.txt, c.txt]\n---\n# Texts\n"
    )
    assert rows(tmp_path) == ["a.txt\na.txt\n"]
    assert len(rows(tmp_path, split="dev")) == 2
    assert rows(tmp_path, data_args={"data_files": "c.txt"}) == ["c.txt\nc.txt\n"]


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.txt.zst", "a.csv.gz", "a.parquet.zst", "a.parquet.gz", "a.jsonl.zst"]
)
@pytest.mark.parametrize("damage", ["none of it", "cut off"])
@pytest.mark.parametrize("streamed", [False, True])
def test_damaged_files_are_a_line(tmp_path, name, damage, streamed):
    whole = compress(b'{"text": "some text"}\n' * 1000, "." + name.rpartition(".")[2])
    (tmp_path / name).write_bytes(b"not compressed at all" if damage == "none of it" else whole[: len(whole) * 2 // 3])
    options = {"data_args": {"streaming": True}, "max_examples": 5000} if streamed else {}
    with pytest.raises(UserError, match=name) as refused:
        rows(tmp_path / name, **options)
    assert "\n" not in str(refused.value)


def test_without_zstd_it_is_said(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", ["one"], ".zst")
    monkeypatch.setattr("pyarrow.Codec", SimpleNamespace(is_available=lambda name: False))
    with pytest.raises(UserError, match=r"\.zst files, but this pyarrow cannot read them: install"):
        rows(tmp_path)


def test_a_compressed_bin_file(tmp_path):
    (tmp_path / "ids.bin.gz").write_bytes(gzip.compress(bytes(100)))
    with pytest.raises(UserError, match=r"ids\.bin\.gz .*or one \.bin file, not compressed"):
        rows(tmp_path / "ids.bin.gz")


def test_a_compressed_file_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path):
    for name in ("nosuch.jsonl.gz", "nosuch.txt.zst", "nosuch.md"):
        with pytest.raises(UserError, match="there is no such file or folder"):
            rows(name)


def test_text_without_a_tokenizer(tmp_path, text_file):
    with pytest.raises(UserError, match="is text, but the model has no tokenizer: add its tokenizer"):
        load_sequences(DataConfig(str(text_file)), None, 16)


def test_the_tokens_of_a_folder(tmp_path, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"line of {number}\n" * 5)
    data = load_sequences(DataConfig(str(tmp_path)), tokenizer, 16)
    text = tokenizer.decode(data.read(np.arange(len(data))).flatten())
    assert text.count("<|end|>") == 4


def test_endings():
    assert ending("a.b/C.JSONL.GZ") == (".jsonl", ".gz")
    assert ending("x.txt") == (".txt", "")
    assert ending(".zst") == ("", "")
    assert ending("plain") == ("", "")
