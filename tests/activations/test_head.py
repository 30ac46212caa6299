"""Whole language models, with and without a head."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    RobertaConfig,
)

from saekit import UserError
from saekit.activations import load_with_head, model_shape, objective_of
from saekit.config import ModelConfig
from tests.activations.test_tap import SMALL


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), "next token"),
        (GPT2Config(), "next token"),
        (BertConfig(), "masked token"),
        (RobertaConfig(architectures=["RobertaForMaskedLM"]), "masked token"),
        (BertConfig(architectures=["BertLMHeadModel"], is_decoder=True), "next token"),
        (RobertaConfig(architectures=["RobertaForCausalLM"]), "next token"),
    ],
)
def test_what_a_model_predicts(config, expected):
    assert objective_of(config) == expected


GPT2 = GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: GPT2LMHeadModel(GPT2), "next token"),
        (lambda: BertForMaskedLM(BertConfig(**SMALL)), "masked token"),
        (lambda: BertModel(BertConfig(**SMALL)), None),
    ],
    ids=["GPT-2", "BERT", "BERT without its head"],
)
def test_a_head_of_random_weights_is_none(model, expected, tmp_path):
    torch.manual_seed(0)
    saved = model().eval()
    saved.save_pretrained(tmp_path)
    cfg = ModelConfig(model=str(tmp_path), dtype="float32")
    loaded, objective = load_with_head(cfg, model_shape(cfg), torch.device("cpu"))
    assert objective == expected
    ids = torch.randint(5, 90, (2, 7))
    with torch.no_grad():
        out, again = saved(input_ids=ids), loaded(input_ids=ids)
    assert torch.equal(out[0], again[0])  # logits, or the last hidden state
    assert len(loaded.base_model.state_dict()) >= len(saved.base_model.state_dict())
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_tied_head_is_there_though_no_file_has_it(tmp_path):
    GPT2Model(GPT2).save_pretrained(tmp_path)
    cfg = ModelConfig(model=str(tmp_path))
    assert load_with_head(cfg, model_shape(cfg), torch.device("cpu")).objective == "next token"


def test_a_block_that_is_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    GPT2LMHeadModel(GPT2).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".h.1." not in name}, file, {"format": "pt"})
    cfg = ModelConfig(model=str(tmp_path))
    with pytest.raises(UserError, match=r"weights such as '.*h\.1\."):
        load_with_head(cfg, model_shape(cfg), torch.device("cpu"))
