"""The language model: load it, find its blocks, tap their outputs."""

from saekit.activations.hookpoints import Blocks, find_blocks, select_layers
from saekit.activations.lm import (
    ModelShape,
    check_device,
    choose_attention,
    context_length,
    load_model,
    load_tokenizer,
    model_shape,
    resolve_ctx_len,
    resolve_dtype,
)
from saekit.activations.tap import tap

__all__ = [
    "Blocks",
    "ModelShape",
    "check_device",
    "choose_attention",
    "context_length",
    "find_blocks",
    "load_model",
    "load_tokenizer",
    "model_shape",
    "resolve_ctx_len",
    "resolve_dtype",
    "select_layers",
    "tap",
]
