"""The logit lens: what a latent's decoder row makes the language model predict."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from saekit.activations import splice
from saekit.activations.hookpoints import text_config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = 2**24
"""Logits that are computed at a time: 64 MiB of float32."""


class Lens(NamedTuple):
    """For each of L latents, the N tokens whose logits rise most, and the N whose logits fall most."""

    promoted_LN: Tensor
    """int64: ids of the tokens whose logits rise, strongest first."""
    rises_LN: Tensor
    """float32: the rise per unit of activation, relative to the mean over the vocabulary."""
    suppressed_LN: Tensor
    """int64: ids of the tokens whose logits fall, strongest first."""
    falls_LN: Tensor
    """float32: the change, which is negative."""


@torch.no_grad()
def logit_lens(model: PreTrainedModel, last: str, mean_D: Tensor, rows_LD: Tensor, number: int, ctx_len: int) -> Lens:
    """Compute how the logits change if a decoder row is added to the residual stream after the last block.

    The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") reads a direction of the residual stream
    through the final norm and the unembedding. This is the derivative of the logits along the direction, at the mean
    output of the last block. It works for any architecture: any kind of norm, a head with several layers (BERT), or
    soft-capped logits (Gemma).

    Args:
        model: The language model, with its head.
        last: The hookpoint of the model's last block.
        mean_D: The mean output of this block, `[D]`.
        rows_LD: Decoder rows, `[L, D]`.
        number: N.
        ctx_len: The longest sequence that the model reads, in tokens.
    """
    parts = []
    at_once = max(1, LOGITS_AT_ONCE // text_config_of(model.config).vocab_size)
    for some in rows_LD.split(at_once):
        rise_LV = _logits_along(model, last, mean_D, some, ctx_len).float()
        rise_LV -= rise_LV.mean(1, keepdim=True)
        up, down = rise_LV.topk(min(number, rise_LV.shape[1])), (-rise_LV).topk(min(number, rise_LV.shape[1]))
        parts.append(Lens(up.indices, up.values, down.indices, -down.values))
    return Lens(*(torch.cat(each).cpu() for each in zip(*parts, strict=True)))


def _logits_along(model: PreTrainedModel, last: str, mean_D: Tensor, rows_LD: Tensor, ctx_len: int) -> Tensor:
    """Compute the derivative of the logits, `[L, V]`, with one position of dummy sequences for each row."""
    count, width = rows_LD.shape
    length = min(ctx_len, count)
    sequences = -(-count // length)
    padded = rows_LD.new_zeros(sequences * length, width)
    padded[:count] = rows_LD
    directions = padded.view(sequences, length, width).to(model.device, model.dtype)
    input_ids = torch.zeros(sequences, length, dtype=torch.int64, device=model.device)
    with forward_ad.dual_level():
        point = forward_ad.make_dual(mean_D.to(directions).expand_as(directions).contiguous(), directions)
        with splice(model, {last: lambda acts: point}):
            logits = model(input_ids=input_ids).logits
        change = forward_ad.unpack_dual(logits).tangent
    return change.flatten(0, 1)[:count]
