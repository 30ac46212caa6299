"""`saekit train --eval-every`: on what, what it equals, and what is refused."""

import json
import shutil

import pytest
from datasets import Dataset

from saekit.runs.layout import EVAL_FILE
from saekit.runs.metrics import EVALUATION, plain, read_metrics
from tests.cli.test_bad_input import assert_refused
from tests.training.runs import assert_same_tensors, tensors_of


def evaluations_of(run):
    return [(each["step"], each["evaluation"]) for each in read_metrics(run / "metrics.jsonl", EVALUATION)]


def test_the_last_one_is_what_saekit_eval_finds(train, saekit, tmp_path):
    """The same documents, the same sequences of them, the same numbers to the last bit."""
    evaluating = ["--eval-every", 10, "--eval-tokens", 1000]
    result = train("--save-dir", tmp_path, "--run-name", "run", "--layers", "0-1", *evaluating)
    assert result.code == 0, result.err
    assert "Evaluating every 10 steps on 31 sequences of 32 tokens; predictions: next token" in result.err
    (first, last) = evaluations_of(tmp_path / "run")
    assert (first[0], last[0]) == (10, 16)
    result = saekit("eval", tmp_path / "run", "--max-tokens", 1000, "--batch-size", 4)
    assert result.code == 0, result.err
    record = plain(json.loads((tmp_path / "run" / "latest" / EVAL_FILE).read_text("utf-8")))
    assert record["held_out"] is True
    for name, value in last[1].items():
        assert record[name] == value, name
    assert len(last[1]["layers"]) == 2


def test_layers_below_the_top_train_as_without(train, tmp_path):
    """With a head and all blocks in memory, and without."""
    for name, more in (("with", ["--eval-every", 5, "--eval-tokens", 500]), ("without", [])):
        result = train("--save-dir", tmp_path, "--run-name", name, *more)
        assert result.code == 0, result.err
    assert_same_tensors(tensors_of(tmp_path / "with" / "latest"), tensors_of(tmp_path / "without" / "latest"))


@pytest.mark.parametrize("way", ["file", "bin", "split"])
def test_on_other_data(train, tmp_path, way, text_file):
    """All of the run's own data is read by the run."""
    ids = Dataset.from_dict({"input_ids": [[5 + n % 7 for n in range(32)]] * 9})
    if way == "file":
        other = tmp_path / "other.txt"
        other.write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
        data, named = text_file, ["--eval-dataset", other]
    elif way == "bin":
        import numpy as np

        for name, count in (("train", 40), ("val", 9)):
            (np.arange(count * 32) % 50).astype(np.uint32).tofile(tmp_path / f"{name}.bin")
        data, named = tmp_path / "train.bin", ["--eval-dataset", tmp_path / "val.bin", "--data-args", "dtype=uint32"]
    else:
        from datasets import DatasetDict

        data, named = tmp_path / "both", ["--eval-split", "test"]
        whole = Dataset.from_dict({"input_ids": [[5 + n % 11 for n in range(32)]] * 40})
        DatasetDict({"train": whole, "test": ids}).save_to_disk(data)
    options = ["--save-dir", tmp_path, "--run-name", "run", "--max-tokens", 10**9, "--eval-every", 1000]
    result = train(*options, *named, data=data)
    assert result.code == 0, result.err
    ((_, found),) = evaluations_of(tmp_path / "run")
    assert found["sequences"] == {"file": 28, "bin": 9, "split": 9}[way]


@pytest.mark.parametrize("named", [[], ["--eval-split", "train"]], ids=["none", "own"])
def test_nothing_left_unread_is_refused_before_the_model_is_loaded(train, tmp_path, named):
    result = train("--eval-every", 5, "--max-tokens", 10**9, *named)
    says = ["unread", "--eval-dataset", "--eval-split", "--max-tokens", "--eval-every"]
    assert_refused(result, *says, folder=tmp_path)
    assert "Loading" not in result.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--eval-every", "0"], ["--eval-every '0'"]),
        (["--eval-every", "often"], ["--eval-every 'often'"]),
        (["--eval-every", "5", "--eval-tokens", "0"], ["--eval-tokens '0'"]),
        (["--eval-dataset", "other"], ["--eval-dataset other", "needs --eval-every"]),
        (["--eval-split", "test"], ["--eval-split test", "needs --eval-every"]),
        (["--eval-every", "5", "--eval-dataset", "./nowhere.txt"], ["nowhere.txt", "no such file"]),
    ],
    ids=" ".join,
)
def test_usage(train, tmp_path, arguments, says):
    assert_refused(train(*arguments), *says, folder=tmp_path)


def test_a_resumed_run_may_evaluate_otherwise(train, saekit, tmp_path):
    evaluating = ["--eval-every", 10, "--eval-tokens", 500]
    assert train("--save-dir", tmp_path, "--run-name", "run", *evaluating).code == 0
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again, symlinks=True)
    result = saekit("train", "--resume", again, "--eval-every", 3, "--eval-tokens", 100)
    assert result.code == 0, result.err
    assert evaluations_of(again) == evaluations_of(tmp_path / "run")  # the last step has been evaluated


def test_an_encoder_predicts_masked_tokens(saekit, tmp_path):
    """BERT with a head; random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special).save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, initializer_range=0.3, **sizes)
    BertForMaskedLM(config).eval().save_pretrained(tmp_path / "lm")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{n * n % 50}" for n in range(4000)), encoding="utf-8")
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{n * n % 47}" for n in range(400)), encoding="utf-8")
    options = ["--ctx-len", 32, "--num-latents", 64, "--k", 4, "--batch-size", 8, "--save-dir", tmp_path]
    evaluating = ["--eval-every", 100, "--eval-dataset", other, "--run-name", "run"]
    result = saekit("train", tmp_path / "lm", text, *options, *evaluating)
    assert result.code == 0, result.err
    ((_, found),) = evaluations_of(tmp_path / "run")
    assert found["objective"] == "masked token"
    result = saekit("eval", tmp_path / "run", other, "--max-tokens", 16_384)
    assert result.code == 0, result.err
    record = plain(json.loads((tmp_path / "run" / "latest" / EVAL_FILE).read_text("utf-8")))
    assert record["layers"] == found["layers"]
    assert record["together"] == found["together"]
