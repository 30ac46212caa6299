"""Hookpoints, the named tensors of a language model, and a search for the blocks of any HuggingFace model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from saekit.errors import UserError
from saekit.sae.storage import IN, layer_number

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


OTHER = "other."
"""The prefix of hookpoints in the second of two models (`--crosscode-models`): `other.layers.3`."""


@dataclass(frozen=True)
class Hookpoint:
    """A named tensor of the language model: the output or the input of one of its modules.

    The name is the module's path relative to the base model, followed by `:in` for the module's input. `layers.3` is a
    block's output (the residual stream), and `layers.3.mlp:in` the input of its MLP. In the second of two models the
    name begins with `OTHER`.
    """

    name: str
    width: int
    """D, the numbers per token."""

    @property
    def module(self) -> str:
        """Return the module's path relative to the base model."""
        return self.own_name.removesuffix(IN)

    @property
    def own_name(self) -> str:
        """Return its name within its own model, without `OTHER`."""
        return self.name.removeprefix(OTHER)

    @property
    def side(self) -> Literal["in", "out"]:
        """Return whether it is the module's input or output."""
        return "in" if self.name.endswith(IN) else "out"

    @property
    def layer(self) -> int | None:
        """Return the number of the block that it belongs to. None outside the blocks."""
        return layer_number(self.module)

    @property
    def is_block(self) -> bool:
        """Return whether it is the output of a whole block."""
        numbers = [part.isdigit() for part in self.module.split(".")]
        return self.side == "out" and numbers[-1] and sum(numbers) == 1  # two numbers: an expert inside a block

    def seed(self, init_seed: int) -> int:
        """Return the seed of a unit's initial weights, which does not depend on the other units.

        It is derived from the layer's number for a block's output, and from a checksum of the name otherwise.
        """
        number = self.layer if self.is_block else None
        return init_seed * 100_003 + (zlib.crc32(self.name.encode()) if number is None else number)


@dataclass(frozen=True)
class Blocks:
    """A model's list of transformer blocks, and its path."""

    prefix: str
    """The list's path relative to the base model: `layers`, `h`, `encoder.layer`, `language_model.layers`."""
    modules: nn.ModuleList

    def hookpoint(self, layer: int) -> str:
        """Return the name of a block's output, which also names its SAE's folder: `layers.3`."""
        return f"{self.prefix}.{layer}"


def block_outputs(model: PreTrainedModel, layers: Sequence[int] | None, stride: int) -> tuple[Hookpoint, ...]:
    """Return the outputs of the chosen blocks of a model, in order.

    Raises:
        UserError: See `find_blocks` and `select_layers`.
    """
    blocks = find_blocks(model)
    d_in = width(text_config_of(model.config))
    chosen = select_layers(len(blocks.modules), layers, stride)
    return tuple(Hookpoint(blocks.hookpoint(layer), d_in) for layer in chosen)


def find_blocks(model: PreTrainedModel) -> Blocks:
    """Find the list of blocks of a model's text part, for any architecture.

    It is the `ModuleList` with one entry per layer of the text config that belongs to the text model itself. A vision
    tower has its own config, and so its own width.

    Raises:
        UserError: If there is no such list, or more than one, as in an encoder-decoder.
    """
    base = model.base_model
    text_config = text_config_of(model.config)
    depth = num_layers(text_config)
    found = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and _owned_by_text_model(base, name, text_config)
    ]
    # A list inside a block, such as of experts, can have the same length: keep the outermost.
    outermost = [(n, m) for n, m in found if not any(n.startswith(f"{other}.") for other, _ in found)]
    if len(outermost) != 1:
        names = ", ".join(name for name, _ in outermost) or "none"
        raise UserError(
            f"{type(model).__name__}: expected one list of {depth} blocks, found {names}. "
            "saekit supports decoder-only and encoder-only models"
        )
    return Blocks(*outermost[0])


def select_layers(depth: int, layers: Sequence[int] | None, stride: int) -> list[int]:
    """Choose the layers to train on, in order, without repeats.

    Raises:
        UserError: If a layer is out of range.
    """
    if layers is None:
        return list(range(0, depth, stride))
    wrong = sorted({layer for layer in layers if not 0 <= layer < depth})
    if wrong:
        raise UserError(
            f"--layers {','.join(map(str, wrong))}: out of range; the model has {depth} layers, 0 to {depth - 1}"
        )
    return sorted(set(layers))


def text_config_of(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the text model. For a text-only model this is the config itself."""
    return config.get_text_config(decoder=True)


def num_layers(text_config: PretrainedConfig) -> int:
    """Return the number of blocks in the text model.

    Raises:
        UserError: If the config does not give it.
    """
    depth = getattr(text_config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise UserError(f"{type(text_config).__name__} does not give the number of layers (num_hidden_layers)")
    return depth


def width(text_config: PretrainedConfig) -> int:
    """Return D, the width of the residual stream.

    Raises:
        UserError: If the config does not give it.
    """
    hidden = getattr(text_config, "hidden_size", None)
    if not isinstance(hidden, int):
        raise UserError(f"{type(text_config).__name__} does not give the width (hidden_size)")
    return hidden


def _owned_by_text_model(base: nn.Module, name: str, text_config: PretrainedConfig) -> bool:
    """Return whether the innermost module around `name` that has a config is the text model, not a vision tower."""
    path = name.split(".")
    for end in range(len(path) - 1, -1, -1):
        config = getattr(base.get_submodule(".".join(path[:end])), "config", None)
        if config is not None:
            owner = text_config_of(config)
            return type(owner) is type(text_config) and getattr(owner, "hidden_size", None) == width(text_config)
    return False
