"""Which language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from saekit.activations import check_device, load_tokenizer, model_shape
from saekit.errors import UserError
from saekit.wizard.draft import Draft, known
from saekit.wizard.walk import Question


def _take(draft: Draft, text: str) -> Draft:
    if not text:
        raise UserError("MODEL is missing: a hub id such as EleutherAI/pythia-160m, or a folder")
    draft = draft.setting(model=text)
    cfg = draft.config().model
    check_device(cfg, known(draft.machine).device)
    return replace(draft, shape=model_shape(cfg), tokenizer=load_tokenizer(cfg))


def _tell(draft: Draft) -> Sequence[str]:
    shape = known(draft.shape)
    limit = f"reads up to {shape.max_ctx_len:,} tokens" if shape.max_ctx_len else "no limit to its context"
    return (f"{type(shape.config).__name__.removesuffix('Config')}: {shape.num_layers} layers of width "
            f"{shape.d_in:,}, {limit}",)  # fmt: skip


MODEL = Question(
    "model",
    "Model",
    lambda draft: "The language model to look into: a hub id or a local folder. Only its config is read now.",
    lambda draft: draft.values.get("model", "EleutherAI/pythia-160m"),
    _take,
    _tell,
    is_path=True,
    working="Reading the model's config",
)
