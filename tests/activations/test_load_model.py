"""Language models on disk that are whole, cut, damaged or not what their config says."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Gemma3Config, Qwen3NextConfig

from saekit import UserError
from saekit.activations import (
    agreed_type,
    choose_attention,
    find_blocks,
    find_tokenizer,
    head,
    lm,
    load_model,
    load_tokenizer,
    load_with_head,
    model_shape,
    tap,
    vocabulary,
    vocabulary_of,
)
from saekit.config import ModelConfig
from tests.activations.test_tap import CASES, GROUPED, SMALL, TOWER, build

CPU = torch.device("cpu")


@pytest.fixture
def copy(model_dir, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(model_dir, tmp_path / "copy")


def load(folder, depth=2):
    cfg = ModelConfig(str(folder), dtype="float32")
    return load_model(cfg, model_shape(cfg), depth, CPU)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("prefix", "config"), CASES)
def test_every_architecture_from_disk(tmp_path, prefix, config, layer):
    """Saved whole, loaded up to one layer: no deeper, under the same names, with the same activations."""
    whole = build(config)
    whole.save_pretrained(tmp_path)
    cut = load(tmp_path, layer + 1)
    assert vocabulary(cut) == vocabulary_of(model_shape(ModelConfig(str(tmp_path))).config)
    blocks = find_blocks(cut)
    assert (blocks.prefix, len(blocks.modules)) == (prefix, layer + 1)
    input_ids = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    name = blocks.hookpoint(layer)
    with tap(whole, [name]) as run, tap(cut, [name]) as run_cut:
        assert torch.equal(run_cut(input_ids)[name], run(input_ids)[name])


def test_lists_with_an_entry_per_layer_are_cut_too(tmp_path):
    """Without the text part's full-attention layer, and beside a vision tower of another width."""
    text = {**GROUPED, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    vision = {**TOWER, "hidden_size": 24, "image_size": 28, "patch_size": 14}
    build(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)).save_pretrained(tmp_path)
    cut = load(tmp_path, 1)
    assert cut.config.get_text_config().layer_types == ["sliding_attention"]
    assert cut.config.vision_config.num_hidden_layers == 3


def test_no_keys_and_values_are_kept(model_dir):
    """They would fill memory that nobody reads."""
    model = AutoModel.from_pretrained(model_dir)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda m, a, k: seen.append(k.get("past_key_values")), with_kwargs=True)
    with tap(model, ["layers.1"]) as run:
        run(torch.ones(1, 4, dtype=torch.int64))
    assert seen == [None]


def test_a_hybrid_cut_before_its_first_attention(tmp_path):
    """Its cache cannot be made from linear attention alone; nothing here needs one."""
    config = Qwen3NextConfig(
        **GROUPED,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    build(config).save_pretrained(tmp_path)
    with tap(load(tmp_path, 2), ["layers.1"]) as run:
        found = run(torch.ones(1, 8, dtype=torch.int64))["layers.1"]
    assert found.shape == (1, 8, SMALL["hidden_size"])


@pytest.mark.parametrize("lost", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_lost_weights(copy, lost):
    weights = load_file(copy / "model.safetensors")
    del weights[lost]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"weights such as '{lost.removeprefix('model.')}'"):
        load(copy)


def test_lost_weights_behind_the_last_layer_do_not_matter(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"], weights["model.layers.2.input_layernorm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    load(copy)


@pytest.mark.parametrize("size", [0, 20, -100])
def test_cut_short(copy, size):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model '.*copy' could not be loaded"):
        load(copy)


def test_weights_of_another_shape(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(UserError, match=r"'layers\.0\.mlp\.\w+\.weight'.*\[(32, 16|16, 32)\].*\[(48, 16|16, 48)\]"):
        load(copy)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "nosuch"}'])
def test_damaged_config(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model '.*copy' could not be loaded") as refused:
        load(copy)
    assert "\n" not in str(refused.value)


def test_no_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"model '.*copy'.*tokenizer") as refused:
        load_tokenizer(ModelConfig(str(copy)))
    assert "\n" not in str(refused.value)


def test_a_folder_has_a_tokenizer_or_none(copy):
    assert len(find_tokenizer(ModelConfig(str(copy)))) == 257
    (copy / "tokenizer.json").unlink()  # what is left says that there should be one
    with pytest.raises(UserError, match="tokenizer"):
        find_tokenizer(ModelConfig(str(copy)))
    for file in copy.glob("*token*"):
        file.unlink()
    assert find_tokenizer(ModelConfig(str(copy))) is None
    with pytest.raises(UserError, match="no such folder"):
        find_tokenizer(ModelConfig("./nosuch"))


@pytest.mark.parametrize(
    ("dtype", "ctx_len", "plain"), [("bfloat16", 8, True), ("bfloat16", 512, False), ("float32", 8, False)]
)
def test_short_sequences_get_plain_attention_in_bfloat16(model_dir, dtype, ctx_len, plain):
    cfg = ModelConfig(str(model_dir), dtype=dtype)
    model = load_model(cfg, model_shape(cfg), 2, CPU)
    input_ids = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    with tap(model, ["layers.1"]) as run:
        before = run(input_ids)["layers.1"].float()
        choose_attention(model, ctx_len)
        after = run(input_ids)["layers.1"].float()
    assert (model.config._attn_implementation == "eager") == plain
    assert (after - before).norm() < 0.02 * before.norm()


class Asked(Exception):  # noqa: N818  # the loader's arguments
    """In place of loading."""


@pytest.mark.parametrize(
    ("device", "sharded", "device_map"),
    [("cuda:1", False, {"": torch.device("cuda", 1)}), ("cuda:1", True, None), ("cpu", False, None)],
)
def test_weights_go_straight_to_a_gpu_unless_deepspeed_shards_them(model_dir, monkeypatch, device, sharded, device_map):
    """Without a device map, every rank would have the whole model in the machine's memory first."""

    def asked(*_, **arguments):
        raise Asked(arguments)

    cfg = ModelConfig(str(model_dir), dtype="float32")
    shape = model_shape(cfg)
    for module in (lm, head):
        monkeypatch.setattr(module, "from_pretrained", asked)
    loads = [lambda: load_model(cfg, shape, 2, torch.device(device), sharded=sharded)]
    if not sharded:
        loads.append(lambda: load_with_head(cfg, shape, torch.device(device)))
    for load in loads:
        with pytest.raises(Asked) as stopped:
            load()
        assert stopped.value.args[0].get("device_map") == device_map


@pytest.mark.parametrize(
    ("asked", "others", "expected"),
    [
        ("auto", ["bfloat16", "bfloat16"], "bfloat16"),
        ("auto", ["bfloat16", "float32"], "float32"),  # an A100 next to a V100
        ("float16", None, "float16"),
    ],
)
def test_all_ranks_load_the_model_in_one_type(monkeypatch, asked, others, expected):
    monkeypatch.setattr("saekit.activations.on_device.has_fast_bf16", lambda _: True)

    def gather(mine):
        assert mine == others[0]
        return others

    assert agreed_type(ModelConfig("model", dtype=asked), CPU, gather).dtype == expected


def test_code_from_a_models_folder_never_runs(tmp_path, monkeypatch):
    """Transformers would ask whether to run it, and take a yes."""
    (tmp_path / "config.json").write_text('{"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}')
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="contains custom code"):
        model_shape(ModelConfig(str(tmp_path)))
    assert not (tmp_path / "ran").exists()
