"""The language model: load it, find its blocks, tap their outputs."""

from saekit.activations.hookpoints import Blocks, find_blocks, select_layers
from saekit.activations.lm import LoadedModel, context_length, load_model, model_shape, resolve_ctx_len
from saekit.activations.tap import tap

__all__ = [
    "Blocks",
    "LoadedModel",
    "context_length",
    "find_blocks",
    "load_model",
    "model_shape",
    "resolve_ctx_len",
    "select_layers",
    "tap",
]
