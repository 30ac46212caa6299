"""What Python callers give wrongly is refused in one sentence that says what was given and what there is."""

import dataclasses

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer

import saekit
from saekit import DataConfig, ModelConfig, RunConfig, Sae, SaeConfig, SaeTrainer, TrainConfig


@pytest.fixture(scope="module")
def model(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def refused(call, *parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # a UserError is one
        call()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("selection", ["topk", "batchtopk", "groupmax"])
@pytest.mark.parametrize("call", ["encode", "forward", "reconstruct"])
@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.randn(2, 64), "a tensor of shape [2, 64]"),
        (torch.randn(32, 2), "a tensor of shape [32, 2]"),
        (torch.tensor(3.0), "a tensor of shape []"),
    ],
)
def test_activations_of_another_width(selection, call, x, got):
    sae = Sae(32, 128, 4, selection=selection)
    refused(lambda: getattr(sae, call)(x), "this SAE needs activations of shape [..., 32]", f"got {got}")


def test_activations_that_are_no_tensor():
    refused(
        lambda: Sae(4, 8, 2).encode([[1.0, 2.0, 3.0, 4.0]]),
        "this SAE needs activations of shape [..., 4]",
        "got a list",
    )


def test_activations_without_a_token_are_fine():
    assert Sae(4, 8, 2).encode(torch.zeros(0, 4)).acts.shape == (0, 2)


CODE = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("acts", "indices", "says"),
    [
        (CODE[0], CODE[1][:2], ["[3, 2] and [2, 2]"]),
        (CODE[0], CODE[0], ["int64", "torch.float32"]),
        (CODE[0], CODE[1] + 8, ["from 8 to 8", "latents 0 to 7"]),
        (CODE[0], CODE[1] - 1, ["from -1 to -1", "latents 0 to 7"]),
        (CODE[0], None, ["indices [..., K]", "a NoneType"]),
    ],
)
def test_codes_that_cannot_be_decoded(acts, indices, says):
    refused(lambda: Sae(4, 8, 2).decode(acts, indices), *says)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([1, 2, 3], ["the data set is a list", "a column input_ids"]),
        ("text.jsonl", ["the data set is a str"]),
        (DatasetDict(train=Dataset.from_dict({"input_ids": [[1, 2]]})), ["the data set is a DatasetDict"]),
        (Dataset.from_dict({"input_ids": [[1, 2]]}).to_iterable_dataset(), ["the data set is a IterableDataset"]),
        (Dataset.from_dict({"text": ["a"]}), ["not tokenized", "columns text, but no input_ids"]),
    ],
    ids=["numbers", "name", "splits", "stream", "text"],
)
def test_a_trainer_without_tokens(model, tmp_path, data, says):
    cfg = TrainConfig(SaeConfig(num_latents=8, k=2), save_dir=tmp_path / "runs")
    refused(lambda: SaeTrainer(cfg, data, model), *says)
    assert not (tmp_path / "runs").exists()


def test_a_trainer_of_something_else(model, tokenizer, model_dir):
    cfg, data = TrainConfig(), Dataset.from_dict({"input_ids": [[1, 2]]})
    run = RunConfig.from_flat({"model": "m", "dataset": "d"})
    refused(lambda: SaeTrainer(SaeConfig(), data, model), "cfg is a SaeConfig", "TrainConfig")
    refused(lambda: SaeTrainer(run, data, model), "cfg is a RunConfig", "pass its attribute `train`")
    refused(lambda: SaeTrainer(cfg, data, str(model_dir)), "the model is a str")
    refused(lambda: SaeTrainer(cfg, data, model, tokenizer="gpt2"), "the tokenizer is a str")
    refused(lambda: SaeTrainer(cfg, data), "needs a data set and a language model")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TrainConfig(batch_size=0), ["--batch-size 0"]),
        (lambda: TrainConfig(batch_siz=1, lr=-1), ["no option 'batch_siz'", "--lr -1"]),
        (lambda: SaeConfig(k=0), ["--k 0"]),
        (lambda: SaeConfig(num_latents=4, k=8), ["--k 8", "4 latents"]),
        (lambda: DataConfig(), ["dataset is missing"]),
        (lambda: ModelConfig("m", dtype="int3"), ["--dtype 'int3'", "'float32'"]),
        (lambda: dataclasses.replace(TrainConfig(), grad_acc_steps="many"), ["--grad-acc-steps 'many'"]),
        (lambda: RunConfig.from_flat({}), ["model is missing", "dataset is missing"]),
    ],
)
def test_options_that_cannot_be(make, says):
    refused(make, *says)


def test_text_that_cannot_be_tokenized(tokenizer):
    rows = Dataset.from_dict({"text": ["some text"] * 20})
    cut = saekit.chunk_and_tokenize
    refused(lambda: cut(["some text"], tokenizer), "the data set is a list")
    refused(lambda: cut(DatasetDict(train=rows), tokenizer), "the data set is a DatasetDict", "one of them")
    refused(lambda: cut(rows.to_iterable_dataset(), tokenizer), "the data set is a IterableDataset")
    refused(lambda: cut(rows, "gpt2"), "the tokenizer is a str")
    refused(lambda: cut(rows, tokenizer, max_seq_len=0), "max_seq_len is 0: expected at least 1")
    refused(lambda: cut(rows, tokenizer, num_proc=-1), "num_proc is -1: expected at least 1")
    refused(lambda: cut(rows, tokenizer, text_key="body"), "'body'", "the data set has text")


def test_evaluating_something_else(model, tmp_path):
    refused(lambda: saekit.evaluate(3), "checkpoint is a int")
    refused(lambda: saekit.evaluate(tmp_path, ["some text"]), "dataset is a list")
    refused(lambda: saekit.evaluate(tmp_path, model=model), "model is a LlamaForCausalLM")
    refused(lambda: saekit.evaluate(tmp_path, max_tokens=0), "max_tokens is 0: expected at least 1")
    refused(lambda: saekit.evaluate(tmp_path, batch_size=0), "batch_size is 0: expected at least 1")


def test_loading_and_saving_something_else(tmp_path):
    saekit.save(Sae(4, 8, 2), tmp_path / "sae")
    for load in (saekit.load, saekit.load_many):
        refused(lambda load=load: load(3), "path is a int")
        refused(lambda load=load: load(tmp_path / "sae", device="nosuch"), "device 'nosuch'")
    if not torch.cuda.is_available():
        refused(lambda: saekit.load(tmp_path / "sae", device="cuda:0"), "device 'cuda:0'", "no CUDA GPU")
    refused(lambda: saekit.save({"W_enc": 1}, tmp_path / "new"), "sae is a dict")
    refused(lambda: saekit.save_as_saelens(None, tmp_path / "new"), "sae is a NoneType")
    refused(lambda: saekit.save(Sae(4, 8, 2), tmp_path / "new", "saelens", {"x": object()}), "metadata", "JSON")
    assert not (tmp_path / "new").exists()
