"""Configs of language models of many kinds, small ones, by name."""

from transformers import (
    BertConfig,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    ModernBertConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
LINEAR = {f"linear_{name}": 4 for name in ("num_value_heads", "num_key_heads", "key_head_dim", "value_head_dim")}

CONFIGS = {
    "gpt2": GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=1),
    "gpt-neox": GPTNeoXConfig(**SMALL),
    "llama": LlamaConfig(**SMALL),
    "gemma-3": Gemma3Config(
        text_config=GROUPED, vision_config={**TOWER, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    ),
    "qwen3": Qwen3Config(**GROUPED),
    "qwen3-moe": Qwen3MoeConfig(**GROUPED, **EXPERTS),
    "qwen3-next": Qwen3NextConfig(
        **{**GROUPED, "num_hidden_layers": 4}, **EXPERTS, **LINEAR, shared_expert_intermediate_size=16
    ),
    "mamba-2": Mamba2Config(
        vocab_size=100, hidden_size=32, num_hidden_layers=3, num_heads=8, head_dim=8, state_size=8, n_groups=1
    ),
    "bert": BertConfig(**SMALL),
    "modernbert": ModernBertConfig(**SMALL, **IDS),
    "falcon": FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
}
