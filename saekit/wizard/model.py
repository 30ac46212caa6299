"""Which language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from saekit.activations import check_device, load_tokenizer, model_shape
from saekit.errors import UserError
from saekit.planning import Machine, describe, detect
from saekit.units import size
from saekit.wizard.draft import Draft, known
from saekit.wizard.walk import Question


def _take_model(draft: Draft, text: str) -> Draft:
    if not text:
        raise UserError("MODEL is missing: a hub id such as EleutherAI/pythia-160m, or a folder")
    draft = draft.setting(model=text)
    cfg = draft.config().model
    check_device(cfg, known(draft.machine).device)
    return replace(draft, shape=model_shape(cfg), tokenizer=load_tokenizer(cfg))


def _tell_model(draft: Draft) -> Sequence[str]:
    shape = known(draft.shape)
    limit = f"reads up to {shape.max_ctx_len:,} tokens" if shape.max_ctx_len else "no limit to its context"
    return (f"{type(shape.config).__name__.removesuffix('Config')}: {shape.num_layers} layers of width "
            f"{shape.d_in:,}, {limit}",)  # fmt: skip


MODEL = Question(
    "model",
    "Model",
    lambda draft: "The language model to look into: a hub id or a local folder. Only its config is read now.",
    lambda draft: draft.values.get("model", "EleutherAI/pythia-160m"),
    _take_model,
    _tell_model,
    is_path=True,
    working="Reading the model's config",
)


def _explain_machine(draft: Draft) -> str:
    here = detect()
    has = _several(here.count, here) if here.on_gpu else f"a {_named(here)}"
    each = "one per GPU" if here.on_gpu else "one is best on a CPU; more share its memory"
    return f"This machine has {has}: {each}. 8x80GiB describes GPUs elsewhere."


def _default_machine(draft: Draft) -> str:
    here = detect()
    earlier = draft.earlier.processes if draft.earlier.on_gpu == here.on_gpu else None
    return draft.processes or str(earlier or here.count)


def _take_machine(draft: Draft, text: str) -> Draft:
    described = re.fullmatch(r"(\d+)\s*[x×]\s*(.+)", text)
    if described is not None and int(described[1]) > 0:
        machine = describe(int(described[1]), described[2])
    elif text.isdecimal() and int(text) > 0:
        machine = detect(int(text))
    else:
        raise UserError(f"--num-processes {text!r}: expected a number such as 2, or 8x80GiB for GPUs elsewhere")
    if machine.count == 1:
        for name in ("layer_map", "shard_lm"):
            if draft.values.get(name):
                raise UserError(f"--{name.replace('_', '-')} has no meaning with one process: ask for more, or drop it")
        if draft.placement:
            raise UserError(f"--placement {draft.placement} needs several processes, not 1")
    return replace(draft, machine=machine)


def _tell_machine(draft: Draft) -> Sequence[str]:
    machine = known(draft.machine)
    if machine.on_gpu:
        return (f"{_several(machine.count, machine)}",)
    return (f"{_named(machine)}, shared by {machine.count} ranks" if machine.count > 1 else _named(machine),)


def _several(count: int, machine: Machine) -> str:
    return f"{count} × {machine.name}, {size(machine.memory)} each"


def _named(machine: Machine) -> str:
    return f"{machine.name}, {size(machine.memory)}"


MACHINE = Question("machine", "Processes", _explain_machine, _default_machine, _take_machine, _tell_machine)
