"""How a language model is loaded on its device: the type, the path of its weights, and the kind of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from saekit.config import ModelConfig
from saekit.errors import UserError
from saekit.sae.kernels import has_fast_bf16

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN_ATTENTION_UP_TO = 256
"""The most tokens per sequence for which a CPU computes attention with plain matmuls."""


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of the language model's weights for a value of `--dtype` on this device."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if has_fast_bf16(device) else torch.float32


def agreed_type(cfg: ModelConfig, device: torch.device, gather: Callable[[str], list[str]]) -> ModelConfig:
    """Return the configuration with one type for all ranks. Collective.

    `auto` may mean different types on different GPUs. If so, all ranks use float32. Ranks that exchange activations of
    different types would misread each other's bytes.

    Args:
        cfg: Which model.
        device: Where this rank loads it.
        gather: `Placement.gather`.
    """
    if cfg.dtype != "auto":
        return cfg
    everywhere = set(gather(str(resolve_dtype("auto", device)).removeprefix("torch.")))
    agreed: Any = everywhere.pop() if len(everywhere) == 1 else "float32"
    return replace(cfg, dtype=agreed)


def check_device(cfg: ModelConfig, device: torch.device) -> None:
    """Check that the device can load the model as configured.

    Raises:
        UserError: If 8-bit weights are requested on a device other than a CUDA GPU.
    """
    if cfg.load_in_8bit and device.type != "cuda":
        raise UserError(
            f"--load-in-8bit needs a CUDA GPU, but the device is {device.type}: leave it out, or use --dtype bfloat16"
        )


def loading_arguments(cfg: ModelConfig, device: torch.device, *, sharded: bool = False) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for the type and device of a model.

    With a device map, each tensor goes to the GPU as soon as it is read. Without one, every rank would first load the
    whole model into the machine's memory. DeepSpeed does not accept a device map when it shards.

    Args:
        cfg: Which model.
        device: Where it goes.
        sharded: Whether DeepSpeed shards it over the ranks while it is loaded.

    Raises:
        UserError: See `check_device`.
    """
    check_device(cfg, device)
    arguments: dict[str, Any] = {"dtype": resolve_dtype(cfg.dtype, device)}
    if cfg.load_in_8bit:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if device.type == "cuda" and not sharded:
        arguments["device_map"] = {"": device}
    return arguments


def choose_attention(model: PreTrainedModel, ctx_len: int) -> None:
    """Make a model on a CPU compute attention in the fastest way for sequences of this length.

    In bfloat16, torch's fused attention is slower than plain matmuls for short sequences. Up to 256 tokens, plain
    matmuls made the whole forward pass 10 to 25% faster. For longer sequences, the scores of all pairs of tokens cost
    more.
    """
    short = ctx_len <= PLAIN_ATTENTION_UP_TO
    if model.device.type == "cpu" and model.dtype == torch.bfloat16 and short:
        model.set_attn_implementation("eager")
