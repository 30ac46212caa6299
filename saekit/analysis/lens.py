"""What a latent's decoder row makes the language model predict: the logit lens."""

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
"""64 MiB of float32."""


class Lens(NamedTuple):
    """Of L latents, the N tokens whose logits rise most, and the N whose logits fall most."""

    promoted_LN: Tensor
    """Token ids, int64, the strongest first."""
    rises_LN: Tensor
    """float32: by how much, relative to the mean over the vocabulary, for an activation of 1."""
    suppressed_LN: Tensor
    falls_LN: Tensor
    """The same for the suppressed tokens; negative."""


@torch.no_grad()
def logit_lens(model: PreTrainedModel, last: str, mean_D: Tensor, rows_LD: Tensor, number: int, ctx_len: int) -> Lens:
    """Compute how the logits change when a decoder row is added to the residual stream behind the last block.

    The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens") reads a direction of the residual stream
    through the final norm and the unembedding. Here it is the derivative of the logits along the direction, at the
    mean output of the last block: for a norm of any kind, a head with more layers (BERT's) or soft-capped logits
    (Gemma's) alike, whatever the model's architecture.

    Args:
        model: With its head.
        last: Hookpoint of the model's last block.
        mean_D: That block's mean output.
        rows_LD: Decoder rows.
        number: N.
        ctx_len: The longest sequence that the model reads.
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
    """The derivative of the logits, `[L, V]`: one place of made-up sequences for each row, whatever those hold."""
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
