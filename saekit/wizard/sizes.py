"""The questions about sizes: latents, k, context, tokens, and batch size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from saekit.activations import resolve_ctx_len
from saekit.config import SaeConfig
from saekit.config.sae import DEFAULT_EXPANSION_FACTOR
from saekit.errors import UserError
from saekit.planning import advise, make_plan
from saekit.units import parse_count, show_count, span
from saekit.wizard.draft import Draft, known
from saekit.wizard.places import widths
from saekit.wizard.walk import Fact, Planned, Question


def _dictionary(draft: Draft) -> str:
    latents, factor = draft.values.get("num_latents"), draft.values.get("expansion_factor")
    return f"{latents} latents" if latents is not None else f"{factor or DEFAULT_EXPANSION_FACTOR}x"


def _take_dictionary(draft: Draft, text: str) -> Draft:
    width = max(widths(draft))
    found = re.fullmatch(r"(.*?)\s*(x|×|latents?|)", text.lower())
    number, unit = parse_count("dictionary size", found[1] if found else text), found[2] if found else ""
    if not unit and number < width:
        raise UserError(
            f"{text} is less than the width {width:,}: write {text}x for {text} latents per dimension, or "
            f"{text} latents for a total of {text}"
        )
    per_dimension = unit in ("x", "×")
    draft = draft.setting(
        expansion_factor=number if per_dimension else None, num_latents=None if per_dimension else number
    )
    # A default k may be too large for this dictionary; the next question asks for k.
    (draft if "k" in draft.typed else draft.setting(k=1)).config()
    return draft


def _latents(draft: Draft) -> list[int]:
    """Return M of each coder."""
    fixed, factor = draft.values.get("num_latents"), draft.values.get("expansion_factor")
    return [width * int(factor) if factor else int(fixed or 0) for width in widths(draft)]


def _k(draft: Draft) -> str:
    if "k" in draft.typed:
        return str(draft.values["k"])
    return str(min(int(draft.values.get("k", SaeConfig().k)), min(_latents(draft))))


def _take_k(draft: Draft, text: str) -> Draft:
    draft = draft.setting(k=text)
    try:
        for width in set(widths(draft)):
            draft.config().train.sae.resolve_num_latents(width)
    except UserError:
        raise
    except ValueError as error:  # raised by the configuration, which knows nothing of the command line
        raise UserError(str(error)) from None
    return draft.setting(k=draft.config().train.sae.k)


DICTIONARY = Question(
    "dictionary",
    "Dictionary",
    lambda draft: (
        f"Latents of each {draft.config().train.coder}, per dimension of its input (32x) or in total (16384). More "
        "latents find finer features."
    ),
    _dictionary,
    _take_dictionary,
    lambda draft: (f"{span(_latents(draft))} latents in each {draft.config().train.coder}",),
)
K = Question(
    "k",
    "Active (k)",
    lambda draft: "Active latents per token. More reconstruct better but are harder to interpret.",
    _k,
    _take_k,
)


def _context(draft: Draft) -> str:
    asked = draft.config().train.ctx_len
    return str(asked or resolve_ctx_len(None, draft.max_ctx_len))


def _take_context(draft: Draft, text: str) -> Draft:
    draft = draft.setting(ctx_len=parse_count("--ctx-len", text))
    resolve_ctx_len(draft.config().train.ctx_len, draft.max_ctx_len)
    return draft


def _explain_context(draft: Draft) -> str:
    limit = draft.max_ctx_len
    upto = f"up to {limit:,}, the model's limit" if limit else "the model has no limit"
    return f"Tokens per sequence ({upto}). Documents are joined and cut to this length."


def _tokens(draft: Draft) -> str:
    asked = draft.config().train.max_tokens
    return show_count(asked) if asked else "all"


def _take_tokens(draft: Draft, text: str) -> Draft:
    if text.lower() == "all":
        return draft.setting(max_tokens=None)
    number, length = parse_count("--max-tokens", text), known(draft.config().train.ctx_len)
    if number < length:
        raise UserError(f"--max-tokens {number} is less than one sequence of {length}: give more")
    return draft.setting(max_tokens=number)


def _take_batch(draft: Draft, text: str) -> Draft:
    draft = draft.setting(batch_size=parse_count("--batch-size", text))
    cfg, machine = draft.config(), known(draft.machine)
    per_step = cfg.train.batch_size * cfg.train.grad_acc_steps * machine.count
    most, length = cfg.train.max_tokens, known(cfg.train.ctx_len)
    if most is not None and most // length < per_step:
        raise UserError(
            f"--max-tokens {most} is {most // length} sequences of {length}, fewer than one optimizer step of "
            f"{per_step}: give a smaller batch, or go back and give more tokens"
        )
    plan = make_plan(cfg, machine)
    if not plan.choices:
        raise UserError(
            f"no placement on {machine.count} ranks supports the other options: change them in {draft.targets.run}"
        )
    return replace(draft, plan=plan, advice=tuple(advise(plan)))


def _tell_batch(draft: Draft) -> Sequence[Fact]:
    job = known(draft.plan).job
    most = job.cfg.train.max_tokens
    steps = f", {-(-most // job.tokens_per_step):,} steps" if most else ""
    return (f"{job.tokens_per_step:,} tokens per optimizer step{steps}", Planned(known(draft.plan), draft.advice))


CONTEXT = Question("ctx_len", "Context", _explain_context, _context, _take_context)
TOKENS = Question(
    "max_tokens",
    "Tokens",
    lambda draft: "How many tokens to train on, such as 100M or 1e9. all reads the data set once.",
    _tokens,
    _take_tokens,
    choices=lambda draft: ("all",),
)
BATCH = Question(
    "batch_size",
    "Batch size",
    lambda draft: "Sequences per process and step. More are faster but need more memory. The plan follows.",
    lambda draft: str(draft.config().train.batch_size),
    _take_batch,
    _tell_batch,
    working="Planning",
)
