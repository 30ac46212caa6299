"""Runs on token ids: what is wrong with them is found before the model is loaded; no tokenizer is needed."""

import json
import re
import shutil

import numpy as np
import pytest
from datasets import Dataset

from saekit.runs.layout import EVAL_FILE
from tests.cli.test_bad_input import assert_refused

VOCABULARY = 257


@pytest.fixture
def ids():
    """Sequences of 32 ids."""
    return np.random.default_rng(0).integers(1, VOCABULARY, (200, 32))


@pytest.fixture
def files(tmp_path_factory):
    """Where data lies: a run that is refused leaves nothing in its own folder."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def bare(model_dir, tmp_path_factory):
    """The tiny model without its tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    for file in model_dir.iterdir():
        if "token" not in file.name:
            shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("really", ["uint32", "int64"])
def test_a_bin_file_of_another_type_trains_nothing(train, tmp_path, files, ids, really):
    ids.astype(really).tofile(files / "ids.bin")
    result = train(data=files / "ids.bin")
    assert_refused(
        result, f"looks like {really}, but is read as uint16", f"--data-args dtype={really}", folder=tmp_path
    )
    assert "Loading" not in result.err
    assert train("--data-args", f"dtype={really}", data=files / "ids.bin").code == 0


@pytest.mark.parametrize("kind", ["bin", "rows"])
def test_foreign_ids_are_named_before_the_model_is_loaded(train, tmp_path, files, ids, kind):
    ids[150, 7] = VOCABULARY
    data = files / f"ids.{kind}"
    if kind == "bin":
        ids.astype("uint16").tofile(data)
    else:
        Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(data)
    result = train("--max-tokens", 10**6, data=data)
    assert_refused(result, "token id 257 at token 7 of sequence 150", "vocabulary has 257 tokens", folder=tmp_path)
    assert "Loading" not in result.err
    with_others = train("--max-tokens", 10**6, "--eval-every", 100, "--eval-dataset", data)
    assert_refused(with_others, "the data to evaluate on has token id 257", folder=tmp_path)


def test_foreign_ids_to_evaluate_on(train, saekit, files, ids):
    assert train("--run-name", "r").code == 0
    for dtype in ("uint16", "uint32"):
        ids.astype(dtype).tofile(files / f"{dtype}.bin")
    assert saekit("eval", "checkpoints/r", files / "uint16.bin", "--max-tokens", 320).code == 0
    assert_refused(saekit("eval", "checkpoints/r", files / "uint32.bin"), "looks like uint32, but is read as uint16")
    ids[:, 3] = 300
    ids.astype("uint16").tofile(files / "foreign.bin")
    result = saekit("eval", "checkpoints/r", files / "foreign.bin")
    assert_refused(result, "the data to evaluate on has token id 300 at token 3 of sequence 0")


def test_the_type_of_a_bin_file_holds_for_another_to_evaluate_on(train, saekit, files, ids):
    for name in ("train", "other"):
        ids.astype("uint32").tofile(files / f"{name}.bin")
    assert train("--run-name", "r", "--data-args", "dtype=uint32", data=files / "train.bin").code == 0
    result = saekit("eval", "checkpoints/r", files / "other.bin", "--max-tokens", 320)
    assert result.code == 0, result.err


@pytest.mark.parametrize("kind", ["bin", "rows"])
def test_a_model_without_a_tokenizer(train, saekit, tmp_path, files, ids, bare, kind):
    data = files / f"ids.{kind}"
    if kind == "bin":
        ids.astype("uint16").tofile(data)
    else:
        Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(data)
    assert train("--dry-run", model=bare, data=data).code == 0
    result = train("--run-name", "r", "--eval-every", 10, "--eval-tokens", 320, model=bare, data=data)
    assert result.code == 0, result.err
    assert "has no tokenizer: taking the special tokens from its config" in result.err + result.out
    result = saekit("eval", "checkpoints/r", "--max-tokens", 320)
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "checkpoints" / "r" / "latest" / EVAL_FILE).read_text("utf-8"))
    assert record["together"] is not None
    result = saekit("report", "checkpoints/r", "--max-tokens", 320, "--latents", 8, "-o", "page.html")
    assert result.code == 0, result.err
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "the page shows token ids" in page
    vocabulary = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["vocabulary"]
    assert vocabulary
    assert all(re.fullmatch(r"\[\d+\]", text) for text in vocabulary)


def test_the_tokenizer_changes_nothing_else(train, files, ids, bare, model_dir, tmp_path):
    """The config's special tokens are the tokenizer's."""
    ids[:, 0] = 0
    ids.astype("uint16").tofile(files / "ids.bin")
    weights = []
    for name, model in (("with", model_dir), ("without", bare)):
        assert train("--run-name", name, model=model, data=files / "ids.bin").code == 0
        weights.append((tmp_path / "checkpoints" / name / "latest" / "layers.1" / "sae.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_text_needs_a_tokenizer(train, saekit, tmp_path, files, ids, bare, text_file):
    assert_refused(train(model=bare), "is text, but the model has no tokenizer", folder=tmp_path)
    ids.astype("uint16").tofile(files / "ids.bin")
    assert train("--run-name", "r", model=bare, data=files / "ids.bin").code == 0
    assert_refused(saekit("eval", "checkpoints/r", text_file), "is text, but the model has no tokenizer")


def test_a_plan_of_a_model_without_a_tokenizer(saekit, bare):
    assert saekit("plan", bare, "--num-latents", 64, "--k", 4).code == 0


@pytest.mark.parametrize("kind", ["folder", "glob"])
def test_a_folder_of_texts_trains_what_a_glob_trains(train, tmp_path, files, documents, kind):
    for number, text in enumerate(documents[:200]):
        (files / f"{number:03}.txt").write_text(f"{text}\n{text}\n")
    data = files if kind == "folder" else files / "*.txt"
    result = train("--run-name", "r", "--max-tokens", 10**6, data=data)
    assert result.code == 0, result.err
    tokens = sum(2 * len(text) + 3 for text in documents[:200])  # two lines and a separator
    assert f"{tokens // 32:,} sequences of 32 tokens" in result.err + result.out
