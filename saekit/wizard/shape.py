"""Which layers, and how large their SAEs are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from saekit.activations import select_layers
from saekit.config import SaeConfig
from saekit.config.sae import DEFAULT_EXPANSION_FACTOR
from saekit.errors import UserError
from saekit.units import parse_count
from saekit.wizard.draft import Draft, known
from saekit.wizard.walk import Question


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
    chosen, depth = _selected(draft), known(draft.shape).num_layers
    loaded = "" if chosen[-1] == depth - 1 else f"; what is above layer {chosen[-1]} is neither loaded nor run"
    return (f"{len(chosen)} of {depth}, one SAE for each{loaded}",)


def _dictionary(draft: Draft) -> str:
    latents, factor = draft.values.get("num_latents"), draft.values.get("expansion_factor")
    return f"{latents} latents" if latents is not None else f"{factor or DEFAULT_EXPANSION_FACTOR}x"


def _take_dictionary(draft: Draft, text: str) -> Draft:
    width = known(draft.shape).d_in
    found = re.fullmatch(r"(.*?)\s*(x|×|latents?|)", text.lower())
    number, unit = parse_count("dictionary size", found[1] if found else text), found[2] if found else ""
    if not unit and number < width:
        raise UserError(
            f"{text} is less than the width {width:,}: write {text}x for so many latents per dimension, or "
            f"{text} latents for so many in all"
        )
    per_dimension = unit in ("x", "×")
    draft = draft.setting(
        expansion_factor=number if per_dimension else None, num_latents=None if per_dimension else number
    )
    # A k that was only suggested may be too large for it; the next question asks for another.
    (draft if "k" in draft.typed else draft.setting(k=1)).config()
    return draft


def _latents(draft: Draft) -> int:
    width = known(draft.shape).d_in
    return int(draft.values.get("num_latents") or width * draft.values["expansion_factor"])


def _k(draft: Draft) -> str:
    if "k" in draft.typed:
        return str(draft.values["k"])
    return str(min(int(draft.values.get("k", SaeConfig().k)), _latents(draft)))


def _take_k(draft: Draft, text: str) -> Draft:
    draft = draft.setting(k=text)
    try:
        draft.config().train.sae.resolve_num_latents(known(draft.shape).d_in)
    except UserError:
        raise
    except ValueError as error:  # the configuration's own, which does not know of the command line
        raise UserError(str(error)) from None
    return draft.setting(k=draft.config().train.sae.k)


LAYERS = Question(
    "layers",
    "Layers",
    lambda draft: "Whose residual stream gets an SAE: all, even, numbers from 0 such as 3,7, or ranges such as 0-11:2.",
    _layers,
    _take_layers,
    _tell_layers,
    choices=lambda draft: ("all", "even"),
)
DICTIONARY = Question(
    "dictionary",
    "Dictionary",
    lambda draft: "Latents of each SAE, per dimension of the model (32x) or in all (16384); more find finer features.",
    _dictionary,
    _take_dictionary,
    lambda draft: (f"{_latents(draft):,} latents in each SAE",),
)
K = Question(
    "k",
    "Active (k)",
    lambda draft: "Latents that are active for each token; more reconstruct better and are harder to read.",
    _k,
    _take_k,
)
