"""Load a language model, find its blocks, tap them, and splice something into them.

Internal: may change in any release. The API is the names in `saekit`.
"""

from saekit.activations.head import ObjectiveName, WithHead, auto_with_head, load_with_head, objective_of, predicts
from saekit.activations.hookpoints import Blocks, find_blocks, select_layers
from saekit.activations.lm import (
    ModelShape,
    context_length,
    excluded_tokens,
    find_tokenizer,
    hookpoint_names,
    load_model,
    load_tokenizer,
    model_shape,
    no_bars,
    resolve_ctx_len,
    shape_of,
    vocabulary,
    vocabulary_of,
)
from saekit.activations.on_device import agreed_type, check_device, choose_attention, resolve_dtype
from saekit.activations.splice import splice, start_after
from saekit.activations.tap import tap

__all__ = [
    "Blocks",
    "ModelShape",
    "ObjectiveName",
    "WithHead",
    "agreed_type",
    "auto_with_head",
    "check_device",
    "choose_attention",
    "context_length",
    "excluded_tokens",
    "find_blocks",
    "find_tokenizer",
    "hookpoint_names",
    "load_model",
    "load_tokenizer",
    "load_with_head",
    "model_shape",
    "no_bars",
    "objective_of",
    "predicts",
    "resolve_ctx_len",
    "resolve_dtype",
    "select_layers",
    "shape_of",
    "splice",
    "start_after",
    "tap",
    "vocabulary",
    "vocabulary_of",
]
