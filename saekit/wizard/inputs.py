"""The first questions: machine, language model, and data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from saekit.activations import ModelShape, check_device, find_tokenizer, model_shape, vocabulary_of
from saekit.activations.same_tokens import check_same_tokens
from saekit.data import Peek, peek
from saekit.data.load import needed
from saekit.errors import UserError
from saekit.planning import Machine, describe, detect
from saekit.units import size
from saekit.wizard.draft import Draft, known
from saekit.wizard.walk import QUOTE, Question


def _take_model(draft: Draft, text: str) -> Draft:
    if not text:
        raise UserError("MODEL is missing: give a hub id such as EleutherAI/pythia-160m, or a folder")
    draft = draft.setting(model=text)
    cfg, second = draft.config().model, draft.config().other_model
    check_device(cfg, known(draft.machine).device)
    shape, tokenizer = model_shape(cfg), find_tokenizer(cfg)
    other = None if second is None else model_shape(second)
    if second is not None and other is not None:
        sizes = vocabulary_of(shape.config), vocabulary_of(other.config)
        check_same_tokens((tokenizer, find_tokenizer(second)), sizes, second.model, lambda text: None)
    return replace(draft, shape=shape, other=other, tokenizer=tokenizer)


def _tell_model(draft: Draft) -> Sequence[str]:
    told = [_described(known(draft.shape))]
    return told if draft.other is None else [*told, f"compared with {draft.values['crosscode_models']}"]


def _described(shape: ModelShape) -> str:
    limit = f"reads up to {shape.max_ctx_len:,} tokens" if shape.max_ctx_len else "no context limit"
    kind = type(shape.config).__name__.removesuffix("Config")
    return f"{kind}: {shape.num_layers} layers of width {shape.d_in:,}, {limit}"


MODEL = Question(
    "model",
    "Model",
    lambda draft: "The language model to train on: a hub id or a local folder. Only its config is read now.",
    lambda draft: draft.values.get("model", "EleutherAI/pythia-160m"),
    _take_model,
    _tell_model,
    is_path=True,
    working="Reading the model's config",
)


def _explain_machine(draft: Draft) -> str:
    here = detect()
    has = _several(here.count, here) if here.on_gpu else f"a {_named(here)}"
    each = "use one process per GPU" if here.on_gpu else "one process is best on a CPU, since more share its memory"
    return f"This machine has {has}: {each}. 8x80GiB describes the GPUs of another machine."


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
        raise UserError(
            f"--num-processes {text!r}: expected a number such as 2, or 8x80GiB for the GPUs of another machine"
        )
    if machine.count == 1:
        for name in ("layer_map", "shard_lm"):
            if draft.values.get(name):
                raise UserError(
                    f"--{name.replace('_', '-')} has no meaning with one process: use more, or leave it out"
                )
        if draft.placement:
            raise UserError(f"--placement {draft.placement} needs several processes, not 1: use more, or leave it out")
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


SHOWN = 64
"""The number of characters of a row to show."""
SAMPLE = 2
"""The number of rows to show."""

OF_THE_DATASET = ("split", "data_args", "text_column")
"""Options that belong to one data set, and have no meaning for another."""
WHICH_CONFIG = re.compile(r"Config name is missing|BuilderConfig .* not found")
WHICH_SPLIT = re.compile(r"no such split|Unknown split|Bad split")
"""Errors of `datasets` if a data set has several configurations or splits. The next questions ask for these."""


def _take_dataset(draft: Draft, text: str) -> Draft:
    if not text:
        raise UserError("DATASET is missing: give a hub id such as NeelNanda/pile-10k, a folder, a file or a glob")
    if text != draft.values.get("dataset"):
        draft = draft.setting(**{name: None for name in OF_THE_DATASET if name not in draft.typed})
    return _open(draft.setting(dataset=text), WHICH_CONFIG, WHICH_SPLIT)


def _open(draft: Draft, *fixable: re.Pattern[str]) -> Draft:
    """Read the first rows of the data set. An error that a later question can fix is stored in the draft."""
    cfg = draft.config()
    token = cfg.model.token
    try:
        found = peek(cfg.data, draft.tokenizer, token, _vocabulary(draft))
    except UserError as error:
        if any(pattern.search(str(error)) for pattern in fixable):
            return replace(draft, peek=None, open_error=str(error))
        raise
    _check(draft, found)
    draft = replace(draft, peek=found, open_error="")
    only = found.text_columns[0] if len(found.text_columns) == 1 else cfg.data.text_column
    if found.tokenized or "text_column" in draft.values or only == cfg.data.text_column:
        return draft
    return draft.setting(text_column=only)


def _check(draft: Draft, found: Peek) -> None:
    if not found.tokenized:
        if not found.text_columns:
            raise UserError(
                f"no column has text or the name input_ids, only {', '.join(found.columns)}: give other data"
            )
        needed(draft.tokenizer)
        return
    vocabulary = _vocabulary(draft)
    highest = max((_highest(row["input_ids"]) for row in found.first), default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise UserError(
            f"the data set has token id {highest:,}, but the model knows {vocabulary:,} tokens: use data that is "
            "tokenized for this model"
        )


def _vocabulary(draft: Draft) -> int | None:
    """Return the size of the model's vocabulary; None if its config does not say."""
    return getattr(known(draft.shape).config.get_text_config(decoder=True), "vocab_size", None)


def _highest(ids: Any) -> int:
    numbers = [each for each in ids if isinstance(each, int)] if isinstance(ids, list) else []
    return max(numbers, default=0)


def _tell_dataset(draft: Draft) -> Sequence[str]:
    found = draft.peek
    if found is None:
        return ()
    columns = f"olumns {', '.join(found.columns)}"
    told = [f"C{columns}" if found.count is None else f"{found.count:,} rows, c{columns}"]
    if found.tokenized:
        told[0] += ": already tokenized"
        texts = [_tokens(draft, row["input_ids"]) for row in found.first[:SAMPLE]]
    elif (column := draft.config().data.text_column) in found.text_columns:
        told[0] += f"; the text is in {column}"
        texts = [row[column] or "" for row in found.first[:SAMPLE]]
    else:
        return told
    return [*told, *(f"{QUOTE}{_short(text)}" for text in texts)]


def _tokens(draft: Draft, ids: Sequence[int]) -> str:
    """Return the first token ids, and their text if the model has a tokenizer."""
    numbers = " ".join(str(each) for each in ids[:8])
    return f"{numbers} …" if draft.tokenizer is None else f"{numbers} … = {draft.tokenizer.decode(ids[:32])!r}"


def _short(text: str) -> str:
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 4 * SHOWN]).split())
    return plain if len(plain) <= SHOWN else f"{plain[: SHOWN - 1]}…"


def _arguments(draft: Draft) -> str:
    return ",".join(f"{name}={value}" for name, value in draft.config().data.data_args.items())


def _longest(draft: Draft) -> str:
    """Return the column that was named, or the one with the most text in the first rows."""
    found = known(draft.peek)
    letters = {name: sum(len(row[name] or "") for row in found.first) for name in found.text_columns}
    return draft.values.get("text_column") or max(letters, key=lambda name: letters[name])


def _take_column(draft: Draft, text: str) -> Draft:
    found = known(draft.peek)
    if text not in found.text_columns:
        raise UserError(f"--text-column {text!r}: the columns with text are {', '.join(found.text_columns)}")
    return draft.setting(text_column=text)


DATASET = Question(
    "dataset",
    "Data",
    lambda draft: "Text or token ids: a hub id, a folder, a file or a glob (.jsonl .parquet .csv .txt .md .bin).",
    lambda draft: draft.values.get("dataset", "NeelNanda/pile-10k"),
    _take_dataset,
    _tell_dataset,
    is_path=True,
    working="Opening the data set",
)
ARGUMENTS = Question(
    "data_args",
    "Part of it",
    lambda draft: f"Which configuration, as name=...: {draft.open_error}",
    _arguments,
    lambda draft, text: _open(draft.setting(data_args=text), WHICH_SPLIT),
    _tell_dataset,
    needed=lambda draft: bool(WHICH_CONFIG.search(draft.open_error)),
    working="Opening the data set",
)
SPLIT = Question(
    "split",
    "Split",
    lambda draft: f"Which split, such as test or test[:10%]: {draft.open_error}",
    lambda draft: draft.config().data.split,
    lambda draft, text: _open(draft.setting(split=text)),
    _tell_dataset,
    needed=lambda draft: bool(WHICH_SPLIT.search(draft.open_error)),
    working="Opening the data set",
)
COLUMN = Question(
    "text_column",
    "Text column",
    lambda draft: "Several columns have text. Which one should be read?",
    _longest,
    _take_column,
    _tell_dataset,
    needed=lambda draft: (
        not known(draft.peek).tokenized and draft.config().data.text_column not in known(draft.peek).text_columns
    ),
    choices=lambda draft: known(draft.peek).text_columns,
)
