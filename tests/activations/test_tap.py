"""Tapping real architectures with random weights."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BertConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from saekit import UserError
from saekit.activations import context_length, find_blocks, load_model, model_shape, resolve_ctx_len, select_layers, tap
from saekit.activations.hookpoints import text_config_of
from saekit.activations.lm import cut_config
from saekit.activations.on_device import check_device
from saekit.config import ModelConfig
from saekit.sae.kernels import has_fast_bf16

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}

ARCHITECTURES = {
    "layers": [
        LlamaConfig(**SMALL),
        GPTNeoXConfig(**SMALL),
        Gemma2Config(**GROUPED),
        Qwen3Config(**GROUPED),
        MixtralConfig(**GROUPED, num_local_experts=3),
    ],
    "h": [GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4)],
    "encoder.layer": [BertConfig(**SMALL)],
    "language_model.layers": [
        Gemma3Config(
            text_config=GROUPED, vision_config={**TOWER, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
        )
    ],
}
CASES = [
    pytest.param(prefix, config, id=type(config).__name__) for prefix, all in ARCHITECTURES.items() for config in all
]


def build(config):
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if isinstance(config, Gemma3Config) else AutoModel
    return auto.from_config(config).eval()


@pytest.fixture
def input_ids():
    return torch.randint(5, 99, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("prefix", "config"), CASES)
def test_a_tap_gives_the_blocks_own_output(prefix, config, input_ids):
    model = build(config)
    blocks = find_blocks(model)
    assert blocks.prefix == prefix
    names = [blocks.hookpoint(layer) for layer in range(3)]
    expected = {}
    handles = [
        block.register_forward_hook(
            lambda m, a, out, n=name: expected.update({n: out[0] if isinstance(out, tuple) else out})
        )
        for name, block in zip(names, blocks.modules, strict=True)
    ]
    with torch.no_grad():
        hidden_states = model.base_model(input_ids=input_ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    with tap(model, names) as run:
        found = run(input_ids)
    assert list(found) == names
    for layer, name in enumerate(names):
        assert found[name].shape == (2, 8, 32)
        assert torch.equal(found[name], expected[name])
        if layer < 2:
            torch.testing.assert_close(found[name], hidden_states[layer + 1])
    if prefix != "encoder.layer":  # behind the last block comes the final norm: that is not the residual stream
        assert not torch.allclose(found[names[2]], hidden_states[3])


@pytest.mark.parametrize(("prefix", "config"), CASES)
def test_a_cut_model_gives_the_same(prefix, config, input_ids):
    model, cut = build(config), build(cut_config(config, 2))
    assert len(find_blocks(cut).modules) == 2
    assert text_config_of(config).num_hidden_layers == 3
    cut.load_state_dict({k: v for k, v in model.state_dict().items() if k in cut.state_dict()})
    names = [f"{prefix}.0", f"{prefix}.1"]
    with tap(model, names) as run, tap(cut, names) as run_cut:
        for name, value in run(input_ids).items():
            assert torch.equal(run_cut(input_ids)[name], value)


def test_nothing_runs_after_the_last_tap(input_ids):
    model = build(LlamaConfig(**SMALL))
    ran = []
    for number, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda m, a, n=number: ran.append(n))
    with tap(model, ["layers.0", "layers.1"]) as run:
        run(input_ids)
    assert ran == [0, 1]


def test_inputs_and_outputs_of_any_module_are_read(input_ids):
    model = build(LlamaConfig(**SMALL))
    names = ["layers.1:in", "layers.1.mlp.down_proj:in", "layers.1.mlp", "layers.1.self_attn:in"]
    with tap(model, ["layers.0", "layers.1.input_layernorm", *names]) as run:
        for _ in range(2):  # the first call runs in another way
            found = run(input_ids)
            assert torch.equal(found["layers.1:in"], found["layers.0"])
            assert torch.equal(found["layers.1.self_attn:in"], found["layers.1.input_layernorm"])  # given by keyword
            assert found["layers.1.mlp.down_proj:in"].shape == (2, 8, 64)
            with torch.inference_mode():
                mlp = model.layers[1].mlp.down_proj(found["layers.1.mlp.down_proj:in"])
            assert torch.equal(found["layers.1.mlp"], mlp)


def test_nothing_runs_after_an_input_that_is_the_last_one(input_ids):
    model = build(LlamaConfig(**SMALL))
    ran = []
    model.layers[1].input_layernorm.register_forward_pre_hook(lambda m, a: ran.append(m))
    with tap(model, ["layers.1:in"]) as run:
        run(input_ids)
    assert not ran


def test_what_is_changed_in_place_later_is_read_as_it_was(input_ids):
    """As Falcon adds the attention to the MLP's output."""
    model = build(LlamaConfig(**SMALL))
    expected = []
    model.layers[1].mlp.register_forward_hook(lambda m, a, out: expected.append(out.clone()))
    model.layers[1].mlp.down_proj.register_forward_hook(lambda m, a, out: None)
    model.layers[1].register_forward_hook(lambda m, a, out: given[-1].mul_(3))
    given = []
    model.layers[1].mlp.register_forward_hook(lambda m, a, out: given.append(out) or None)
    with tap(model, ["layers.1.mlp", "layers.2"]) as run:
        for _ in range(3):
            assert torch.equal(run(input_ids)["layers.1.mlp"], expected[-1])


def test_the_model_is_restored_also_after_an_error(input_ids):
    model = build(LlamaConfig(**SMALL)).train()
    handle = model.layers[0].register_forward_pre_hook(lambda m, a: 1 / 0)
    with pytest.raises(ZeroDivisionError), tap(model, ["layers.0"]) as run:
        run(input_ids)
    handle.remove()
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert model(input_ids).last_hidden_state.requires_grad


@pytest.mark.parametrize(
    ("hookpoints", "says"),
    [
        (["layers.0", "layers.99"], "'layers.99' is not a module of LlamaModel: layers has 0 to 2"),
        (["layers.1.mlq:in"], r"'layers.1.mlq' is not a module of LlamaModel: layers.1 has self_attn, mlp, "),
        (["rotary_emb"], r"rotary_emb cannot be read: .*\[1, 8, 8\], not \[batch, tokens, width\]"),
        (["embed_tokens:in"], r"embed_tokens:in cannot be read: .*, not \[batch, tokens, width\]"),
        (["norm.weight.x"], "'norm.weight.x' is not a module of LlamaModel: norm has no modules"),
        ([3], "3 is not a module of LlamaModel: it has embed_tokens, layers, norm, rotary_emb"),
        ("layers.1", r"hookpoints is the string 'layers.1': pass a list, such as \['layers.1'\]"),
        (["layers"], "layers did not run in the forward pass of LlamaModel"),
    ],
)
def test_what_cannot_be_tapped_is_one_sentence(input_ids, hookpoints, says):
    model = build(LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match=f"^{says}") as refused, tap(model, hookpoints) as run:
        run(input_ids)
    assert "\n" not in str(refused.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_is_none_is_refused():
    for model in ("gpt2", torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="pass a loaded transformers model"), tap(model, ["layers.0"]):
            pass


def test_blocks_that_share_their_weights_all_have_names(input_ids):
    model = build(LlamaConfig(**SMALL))
    model.layers[2] = model.layers[1]
    with tap(model, ["layers.2"]) as run:
        assert run(input_ids)["layers.2"].shape == (2, 8, 32)


def test_taps_are_inference_tensors_and_indexing_makes_them_ordinary(input_ids):
    model = build(LlamaConfig(**SMALL))
    with tap(model, ["layers.0"]) as run:
        run(input_ids)
        x = run(input_ids)["layers.0"]
    assert x.is_inference()
    assert not x[torch.ones(2, 8, dtype=torch.bool)].is_inference()


def test_encoder_decoders_are_refused():
    model = build(T5Config(vocab_size=100, d_model=32, num_layers=3, num_heads=4, d_ff=64, d_kv=8))
    with pytest.raises(UserError, match=r"encoder\.block, decoder\.block"):
        find_blocks(model)


def test_only_what_is_needed_is_loaded(model_dir, input_ids):
    cfg = ModelConfig(str(model_dir), dtype="float32")
    shape = model_shape(cfg)
    assert (shape.num_layers, shape.d_in, shape.max_ctx_len) == (3, 16, 64)
    cut = load_model(cfg, shape, 2, torch.device("cpu"))
    assert len(find_blocks(cut).modules) == 2
    assert not cut.training
    assert not any(parameter.requires_grad for parameter in cut.parameters())
    whole = AutoModel.from_pretrained(model_dir)
    with tap(cut, ["layers.1"]) as run, tap(whole, ["layers.1"]) as run_whole:
        assert torch.equal(run(input_ids)["layers.1"], run_whole(input_ids)["layers.1"])


def test_dtype(model_dir):
    cfg = ModelConfig(str(model_dir), dtype="bfloat16")
    assert load_model(cfg, model_shape(cfg), 1, torch.device("cpu")).dtype == torch.bfloat16
    auto = load_model(ModelConfig(str(model_dir)), model_shape(cfg), 1, torch.device("cpu")).dtype
    assert auto == (torch.bfloat16 if has_fast_bf16(torch.device("cpu")) else torch.float32)


def test_loading_says_nothing(model_dir, capfd):
    cfg = ModelConfig(str(model_dir))
    load_model(cfg, model_shape(cfg), 1, torch.device("cpu"))
    captured = capfd.readouterr()
    assert "UNEXPECTED" not in captured.out + captured.err
    assert "not sharded" not in captured.out + captured.err


def test_eight_bits_need_a_gpu(model_dir):
    with pytest.raises(UserError, match="needs a CUDA GPU, but the device is cpu"):
        check_device(ModelConfig(str(model_dir), load_in_8bit=True), torch.device("cpu"))


def test_select_layers():
    assert select_layers(6, None, 1) == [0, 1, 2, 3, 4, 5]
    assert select_layers(6, None, 4) == [0, 4]
    assert select_layers(6, (5, 1, 1), 1) == [1, 5]
    with pytest.raises(UserError, match="--layers -1,6: out of range"):
        select_layers(6, (6, -1, 2), 1)


def test_resolve_ctx_len():
    assert resolve_ctx_len(None, 512) == 512
    assert resolve_ctx_len(None, None) == resolve_ctx_len(None, 10**6) == 2048
    assert resolve_ctx_len(100, 512) == 100
    assert resolve_ctx_len(None, 512, None, 256) == 256
    with pytest.raises(UserError, match="--ctx-len 513 is more than the 512 tokens"):
        resolve_ctx_len(513, 512)


def test_positions_that_start_after_the_padding_are_not_counted():
    config = RobertaConfig(**SMALL, max_position_embeddings=66, pad_token_id=1)
    assert context_length(config) == 64
    model = build(config)
    names = [find_blocks(model).hookpoint(2)]
    with tap(model, names) as run:
        assert run(torch.full((1, 64), 5))[names[0]].shape == (1, 64, 32)
    assert context_length(BertConfig(**SMALL, max_position_embeddings=66)) == 66
    assert context_length(GPT2Config(vocab_size=100, n_positions=50)) == 50


def test_the_cut_leaves_token_ids_alone():
    config = LlamaConfig(**SMALL, eos_token_id=[1, 2, 3])
    assert cut_config(config, 2).eos_token_id == [1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_eight_bits_on_a_gpu(model_dir, input_ids):
    cfg = ModelConfig(str(model_dir), load_in_8bit=True)
    model = load_model(cfg, model_shape(cfg), 2, torch.device("cuda", 0))
    with tap(model, ["layers.1"]) as run:
        assert torch.isfinite(run(input_ids.cuda())["layers.1"]).all()
