"""The questions about sites: what coders read and write, and in which layers."""

from __future__ import annotations

from collections.abc import Sequence

from saekit.activations import select_layers
from saekit.activations.chosen import chosen
from saekit.activations.patterns import fold
from saekit.activations.sites import Site
from saekit.units import plural, span
from saekit.wizard.draft import Draft, known
from saekit.wizard.walk import Question

RESID, TRANSCODERS = "resid", "transcoders"


def sites(draft: Draft) -> tuple[Site, ...]:
    """Return what the coders of a draft read and write.

    Raises:
        UserError: See `saekit.activations.chosen.chosen`.
    """
    return chosen(draft.config().train, known(draft.shape), draft.other).sites


def widths(draft: Draft) -> list[int]:
    """Return D of each coder."""
    return [site.d_in for site in sites(draft)]


def _kind(draft: Draft) -> str:
    train = draft.config().train
    if train.transcode and train.hookpoints is None:
        return TRANSCODERS
    return ",".join(train.hookpoints or (RESID,))


def _can_be_an_answer(draft: Draft) -> bool:
    """Tell whether the options can be given as an answer here: --reads, --writes and --crosscode cannot."""
    train = draft.config().train
    return train.reads is None and train.crosscode is None and not (train.transcode and train.hookpoints)


def _take_kind(draft: Draft, text: str) -> Draft:
    transcodes = text.lower() in (TRANSCODERS, "transcoder")
    patterns = None if transcodes or text == RESID else text
    draft = draft.setting(hookpoints=patterns, transcode=True if transcodes else None)
    sites(draft)
    return draft


def _tell_kind(draft: Draft) -> Sequence[str]:
    found = sites(draft)
    names = ", ".join(list(fold([site.name for site in found]))[:4])
    return (f"{plural(len(found), draft.config().train.coder)} of width {span(widths(draft))}: {names}",)


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
    sites(draft)
    return draft


def _selected(draft: Draft) -> list[int]:
    train = draft.config().train
    return select_layers(known(draft.shape).num_layers, train.layers, train.layer_stride)


def _tell_layers(draft: Draft) -> Sequence[str]:
    selected, depth = _selected(draft), known(draft.shape).num_layers
    loaded = "" if selected[-1] == depth - 1 else f"; layers above {selected[-1]} are neither loaded nor run"
    number = len(sites(draft))
    coder = draft.config().train.coder
    what = f"one {coder} per layer" if number == len(selected) else plural(number, coder)
    return (f"{len(selected)} of {depth}, {what}{loaded}",)


KIND = Question(
    "hookpoints",
    "Hookpoints",
    lambda draft: (
        "What to train on: resid (outputs of blocks), mlp, attn, paths such as layers.*.mlp:in"
        + (", or transcoders, which read the input of each MLP and predict its output." if draft.other is None else ".")
    ),
    _kind,
    _take_kind,
    _tell_kind,
    needed=_can_be_an_answer,
    choices=lambda draft: (RESID, "mlp", "attn", *([TRANSCODERS] if draft.other is None else [])),
    working="Looking at the model",
)
LAYERS = Question(
    "layers",
    "Layers",
    lambda draft: "Which layers: all, even, numbers from 0 such as 3,7, or ranges such as 0-11:2.",
    _layers,
    _take_layers,
    _tell_layers,
    choices=lambda draft: ("all", "even"),
)
