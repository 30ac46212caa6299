"""Running a model from the middle on."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
)

from saekit.activations import find_blocks, splice, start_after

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
FED = {**SIZES, "intermediate_size": 32}
MODELS = {
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**FED, num_key_value_heads=1)),
    "gemma2": lambda: AutoModelForCausalLM.from_config(Gemma2Config(**FED, num_key_value_heads=1, head_dim=8)),
    "gpt-neox": lambda: AutoModelForCausalLM.from_config(GPTNeoXConfig(**FED)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=1)
    ),
    "bert": lambda: AutoModelForMaskedLM.from_config(BertConfig(**FED)),
}
IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
def test_the_rest_gives_what_the_whole_gives(model, layer):
    name, seen = find_blocks(model).hookpoint(layer), {}
    with splice(model, {name: lambda acts: seen.setdefault("acts", acts)}):
        whole = model(input_ids=IDS).logits
    counted = []
    handles = [
        block.register_forward_pre_hook(lambda *_: counted.append(1))
        for block in (block.get_submodule(part) for block in find_blocks(model).modules for part in _parts(block))
    ]
    with start_after(model, name, seen["acts"]):
        assert torch.equal(model(input_ids=IDS).logits, whole)
    assert len(counted) == sum(len(_parts(block)) for block in list(find_blocks(model).modules)[layer + 1 :])
    with start_after(model, name, 2 * seen["acts"]):
        changed = model(input_ids=IDS).logits
    with splice(model, {name: lambda acts: 2 * acts}):
        assert torch.equal(model(input_ids=IDS).logits, changed)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(input_ids=IDS).logits, whole)


def _parts(block):
    return [name for name, part in block.named_children() if "ttention" in type(part).__name__]


def test_a_block_gets_its_own_forward_back():
    model = MODELS["llama"]().eval()
    blocks = find_blocks(model).modules
    own = blocks[0].forward
    blocks[0].forward = lambda *args, **kwargs: own(*args, **kwargs)
    patched = blocks[0].forward
    with pytest.raises(ZeroDivisionError), start_after(model, "layers.1", torch.zeros(2, 10, 16)):
        raise ZeroDivisionError
    assert blocks[0].__dict__["forward"] is patched
    assert "forward" not in blocks[1].__dict__
