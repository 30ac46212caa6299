"""The cost of the language model: its weights, and its forward pass up to the last hookpoint. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from saekit.activations import ModelShape, auto_with_head, find_blocks, tap
from saekit.activations.lm import cut_config
from saekit.activations.on_device import PLAIN_ATTENTION_UP_TO
from saekit.planning.meter import NOTHING, Bytes, Meter, StandIn, all_of, sized

WHOLE_UP_TO = 10_000
"""Tensors with at most this many elements stay whole in `saekit.placement.deepspeed.load_sharded`."""
SCALE_BYTES = 4
"""Bytes of the float32 scale of each output of an 8-bit matrix."""


@dataclass(frozen=True)
class LmCost:
    """The cost of a language model as it is loaded: whole, or cut off after the last block that is needed."""

    weights: Bytes
    forward: Bytes
    """The peak of a forward pass of one micro-batch without the weights, including the tapped activations."""
    flops_per_token: float
    """Operations of that forward pass per token, 2 per multiply-add."""
    small: Bytes
    """The weights in tensors that stay whole if the model is sharded."""
    largest_module: int
    """Bytes of the module whose own tensors are the largest."""
    blocks: int
    """The number of blocks."""
    element: int
    """Bytes per number."""


NO_MODEL = LmCost(NOTHING, NOTHING, 0.0, NOTHING, 0, 0, 0)
"""Of a run on a cache of activations."""
KNOWN: dict[tuple[object, ...], LmCost] = {}
"""A cache of results, since advice plans the same model many times."""


def language_model_cost(
    shape: ModelShape,
    hookpoints: list[str],
    depth: int,
    *,
    batch_size: int,
    ctx_len: int,
    dtype: torch.dtype,
    in_8_bits: bool,
    on_gpu: bool,
    whole: bool = False,
) -> LmCost:
    """Build the model on the meta device, run the training's own tap on it, and read the meter.

    Args:
        shape: From the model's config.
        hookpoints: The names of the hookpoints to read.
        depth: The number of blocks that are needed for them.
        batch_size: Sequences per micro-batch.
        ctx_len: Tokens per sequence.
        dtype: The type of weights and activations.
        in_8_bits: Whether its matrices are int8 (`--load-in-8bit`).
        on_gpu: Whether it runs on a GPU. On a CPU, short sequences use another attention.
        whole: Whether all its blocks and its head are loaded, for `--eval-every`.
    """
    from transformers import AutoModel
    from transformers.pytorch_utils import Conv1D

    config = cut_config(shape.config, depth)
    asked = (config.to_json_string(), *hookpoints, batch_size, ctx_len, dtype, in_8_bits, on_gpu, whole)
    if asked in KNOWN:
        return KNOWN[asked]
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype).eval()
        loaded = model if not whole else auto_with_head(shape.config).from_config(shape.config, dtype=dtype)
    blocks = find_blocks(model)
    if not on_gpu and dtype == torch.bfloat16 and ctx_len <= PLAIN_ATTENTION_UP_TO:
        model.set_attn_implementation("eager")
    matrices = {
        id(module.weight)
        for module in loaded.modules()
        if in_8_bits and isinstance(module, (nn.Linear, Conv1D)) and module is not loaded.get_output_embeddings()
    }

    def bytes_of(tensors: Iterable[Any]) -> Bytes:
        sizes = (
            each.numel() + SCALE_BYTES * each.shape[0] if id(each) in matrices else each.numel() * each.element_size()
            for each in {id(tensor): tensor for tensor in tensors}.values()
        )
        return all_of(sized(size, on_gpu) for size in sizes)

    input_ids = torch.zeros(batch_size, ctx_len, dtype=torch.int64, device="meta")
    with tap(model, hookpoints) as read_residual, StandIn(linear_in_8_bits=in_8_bits), Meter(on_gpu) as meter:
        taken = read_residual(input_ids)
        del taken
    in_blocks = sum(parameter.numel() for parameter in blocks.modules.parameters() if parameter.ndim == 2)
    # Attention scores and weighted sums each cost a multiply-add per pair of tokens and dimension. A causal mask halves
    # the pairs.
    attention = 2 * 2 * ctx_len * shape.d_in * len(blocks.modules) / 2
    KNOWN[asked] = LmCost(
        weights=bytes_of([*loaded.parameters(), *loaded.buffers()]),
        forward=meter.peak,
        flops_per_token=2 * in_blocks + attention,
        small=bytes_of([each for each in model.parameters() if each.numel() <= WHOLE_UP_TO] + list(model.buffers())),
        largest_module=max(bytes_of(each.parameters(recurse=False)).total for each in model.modules()),
        blocks=len(blocks.modules),
        element=dtype.itemsize,
    )
    return KNOWN[asked]


def of_two_models(first: LmCost, second: LmCost, kept: Bytes) -> LmCost:
    """Return the cost of two models that read the same tokens one after the other.

    Args:
        first: The cost of the model that runs first.
        second: The cost of the other model.
        kept: The first model's activations, which are in memory while the second runs.
    """
    return LmCost(
        weights=first.weights + second.weights,
        forward=first.forward.maximum(second.forward + kept),
        flops_per_token=first.flops_per_token + second.flops_per_token,
        small=first.small + second.small,
        largest_module=max(first.largest_module, second.largest_module),
        blocks=first.blocks + second.blocks,
        element=max(first.element, second.element),
    )
