"""Questions: which layers, how large their SAEs are, how many tokens, and in what portions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from saekit.activations import resolve_ctx_len, select_layers
from saekit.activations.chosen import chosen
from saekit.config import SaeConfig
from saekit.config.sae import DEFAULT_EXPANSION_FACTOR
from saekit.errors import UserError
from saekit.planning import advise, make_plan
from saekit.units import parse_count, show_count
from saekit.wizard.draft import Draft, known
from saekit.wizard.walk import Fact, Planned, Question


def _layers(draft: Draft) -> str:
    layers, stride = draft.values.get("layers"), draft.config().train.layer_stride
    if layers is not None:
        return layers if isinstance(layers, str) else ",".join(map(str, draft.config().train.layers or ()))
    return "all" if stride == 1 else f"0-{known(draft.shape).num_layers - 1}:{stride}"


def _take_layers(draft: Draft, text: str) -> Draft:
    last = known(draft.shape).num_layers - 1
    text = {"even": f"0-{last}:2", "all": ""}.get(text.lower(), text)
    draft = draft.setting(layers=text or None, layer_stride=None)
    _selected(draft)
    return draft


def _selected(draft: Draft) -> list[int]:
    train = draft.config().train
    return select_layers(known(draft.shape).num_layers, train.layers, train.layer_stride)


def _tell_layers(draft: Draft) -> Sequence[str]:
    layers, depth = _selected(draft), known(draft.shape).num_layers
    loaded = "" if layers[-1] == depth - 1 else f"; what is above layer {layers[-1]} is neither loaded nor run"
    return (f"{len(layers)} of {depth}, {_coders(draft)}{loaded}",)


def _coders(draft: Draft) -> str:
    """Say what is trained in the chosen layers."""
    train = draft.config().train
    if train.coder == "SAE" and train.hookpoints is None:
        return "one SAE for each"
    asked = {name: getattr(train, name) for name in ("hookpoints", "reads", "writes", "crosscode")}
    where = " ".join(f"--{name} {','.join(patterns)}" for name, patterns in asked.items() if patterns is not None)
    what = "one crosscoder" if train.coder == "crosscoder" else f"{train.coder}s"
    return f"{what} at {where}" if where else f"{what} of their MLPs"


def _where(draft: Draft) -> str:
    coders = _coders(draft)
    return "Whose residual stream gets an SAE" if coders == "one SAE for each" else f"In which layers {coders}"


def _width(draft: Draft) -> int:
    """Return what the first coder reads."""
    return chosen(draft.config().train, known(draft.shape)).sites[0].d_in


def _dictionary(draft: Draft) -> str:
    latents, factor = draft.values.get("num_latents"), draft.values.get("expansion_factor")
    return f"{latents} latents" if latents is not None else f"{factor or DEFAULT_EXPANSION_FACTOR}x"


def _take_dictionary(draft: Draft, text: str) -> Draft:
    width = _width(draft)
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
    # A k that was only suggested may be too large for it; the next question asks for another.
    (draft if "k" in draft.typed else draft.setting(k=1)).config()
    return draft


def _latents(draft: Draft) -> int:
    width = _width(draft)
    return int(draft.values.get("num_latents") or width * draft.values["expansion_factor"])


def _k(draft: Draft) -> str:
    if "k" in draft.typed:
        return str(draft.values["k"])
    return str(min(int(draft.values.get("k", SaeConfig().k)), _latents(draft)))


def _take_k(draft: Draft, text: str) -> Draft:
    draft = draft.setting(k=text)
    try:
        draft.config().train.sae.resolve_num_latents(_width(draft))
    except UserError:
        raise
    except ValueError as error:  # the configuration's own, which does not know of the command line
        raise UserError(str(error)) from None
    return draft.setting(k=draft.config().train.sae.k)


LAYERS = Question(
    "layers",
    "Layers",
    lambda draft: f"{_where(draft)}: all, even, numbers from 0 such as 3,7, or ranges such as 0-11:2.",
    _layers,
    _take_layers,
    _tell_layers,
    choices=lambda draft: ("all", "even"),
)
DICTIONARY = Question(
    "dictionary",
    "Dictionary",
    lambda draft: (
        f"Latents of each {draft.config().train.coder}, per dimension of the model (32x) or in total (16384); more "
        "find finer features."
    ),
    _dictionary,
    _take_dictionary,
    lambda draft: (f"{_latents(draft):,} latents in each {draft.config().train.coder}",),
)
K = Question(
    "k",
    "Active (k)",
    lambda draft: "Latents that are active for each token; more reconstruct better and are harder to read.",
    _k,
    _take_k,
)


def _context(draft: Draft) -> str:
    asked = draft.config().train.ctx_len
    return str(asked or resolve_ctx_len(None, known(draft.shape).max_ctx_len))


def _take_context(draft: Draft, text: str) -> Draft:
    draft = draft.setting(ctx_len=parse_count("--ctx-len", text))
    resolve_ctx_len(draft.config().train.ctx_len, known(draft.shape).max_ctx_len)
    return draft


def _explain_context(draft: Draft) -> str:
    limit = known(draft.shape).max_ctx_len
    upto = f"up to {limit:,}, the model's limit" if limit else "the model has no limit"
    return f"Tokens per sequence ({upto}); documents are joined and cut to this length."


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
            f"{per_step}: give a smaller batch, or go back for more tokens"
        )
    plan = make_plan(cfg, machine)
    if not plan.choices:
        raise UserError(f"no placement on {machine.count} ranks goes with the other options of {draft.targets.run}")
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
    lambda draft: "How many to train on, such as 100M or 1e9; all is the data set once.",
    _tokens,
    _take_tokens,
    choices=lambda draft: ("all",),
)
BATCH = Question(
    "batch_size",
    "Batch size",
    lambda draft: "Sequences per process and step; more are faster and need more memory. The plan follows.",
    lambda draft: str(draft.config().train.batch_size),
    _take_batch,
    _tell_batch,
    working="Planning",
)
