"""Compute a checkpoint's features over a text: firings, contexts, neighbors, and each feature's logit lens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saekit.activations import find_blocks
from saekit.activations.chosen import off_stream
from saekit.activations.pair import tap_all
from saekit.activations.sites import Site, hookpoints_of
from saekit.analysis.altered import joined
from saekit.analysis.codes import Codes, Contexts, Histograms, find_contexts
from saekit.analysis.evaluate import Progress
from saekit.analysis.lens import Lens, logit_lens
from saekit.analysis.measure import Neighbours, nearest_rows
from saekit.analysis.sharing import evened, part_norms, scales_of
from saekit.analysis.subject import Subject

TOP, SPREAD = 10, 5
"""Contexts per latent: the strongest, and a sample of the weaker ones."""
QUANTILES = (0.1, 0.5, 0.9, 1.0)
NEIGHBOURS = 8
LENS_TOKENS = 8
FAVORITES = 5
BINS = 20
"""Of a latent's histogram of activations."""
DENSEST = 100
"""The number of densest latents that always have a page."""
FIRINGS_AT_ONCE = 2**26
"""The most firings that are read in one pass over the text. They take about 1 GiB, and 3 GiB while they are sorted."""
NOTHING_KNOWN: Mapping[str, Sequence[float]] = {}


@dataclass(frozen=True)
class LayerFeatures:
    """The features of one coder: M latents, L of which have a page."""

    hookpoint: str
    counts_M: np.ndarray
    """int64: the number of tokens on which each latent fired."""
    latents_L: np.ndarray
    """int64: indices of the latents with a page, ascending."""
    quantiles_L: np.ndarray
    """float32 `[L, len(QUANTILES)]`: quantiles of the activations on the tokens on which a latent fired."""
    histograms: Histograms
    """Histograms of the same activations, with `BINS` bins."""
    contexts: Contexts
    favorites_L: np.ndarray
    """int64 `[L, FAVORITES]`: ids of the tokens on which a latent fires most often, padded with -1."""
    shares_L: np.ndarray
    """float32: the share of the latent's firings on each of these tokens."""
    neighbours: Neighbours
    lens: Lens | None
    """None if the model has no head, or if the coder does not write to the residual stream."""
    no_lens: str | None = None
    """Why there is no lens, if the model has a head."""
    part_norms_LH: Tensor | None = None
    """For a crosscoder: norms of the decoder rows at each of its H hookpoints, on one scale."""


@dataclass(frozen=True)
class Features:
    """The features of all coders of a checkpoint over one text."""

    ids_ST: np.ndarray
    """The text, int64 `[S, T]`."""
    layers: tuple[LayerFeatures, ...]


def gather_features(
    subject: Subject,
    budget: int | None,
    progress: Progress = lambda done, of: None,
    scales: Mapping[str, Sequence[float]] = NOTHING_KNOWN,
) -> Features:
    """Compute the features of all layers at once. See `each_layer`."""
    return Features(read_text(subject), tuple(each_layer(subject, budget, progress, scales)))


def read_text(subject: Subject) -> np.ndarray:
    """Return the text's token ids, int64 `[S, T]`."""
    return subject.data.read(np.arange(len(subject.data))).numpy()


def each_layer(
    subject: Subject,
    budget: int | None,
    progress: Progress = lambda done, of: None,
    scales: Mapping[str, Sequence[float]] = NOTHING_KNOWN,
) -> Iterator[LayerFeatures]:
    """Compute the codes of every layer over the whole text, and yield the features of one layer after the other.

    Codes of several layers are in memory together, at most about 3 GiB, and the features of one layer, at most about
    4 KiB per latent together with what is made from them.

    Args:
        subject: Coders, model and text, in one process.
        budget: The number of latents with a page, over all layers. Each layer gets the same share. None for all.
        progress: Called after each batch and each layer.
        scales: For each crosscoder, by name, the scales under which its hookpoints' decoder parts are compared
            (`Sharing`). By default those that give the parts the same root mean square norm.
    """
    names, ids_ST = list(subject.saes), read_text(subject)
    groups = list(_groups(subject, names, ids_ST.size))
    of, done = len(groups) * subject.num_batches + len(names), 0

    def one_more() -> None:
        nonlocal done
        done += 1
        progress(done, of)

    share = None if budget is None else max(1, budget // len(names))
    for group in groups:
        codes, mean_D = read_codes(subject, group, one_more)
        for name in group:
            yield _features(subject, name, codes.pop(name), ids_ST, mean_D, share, scales.get(name))
            one_more()


@torch.inference_mode()
def read_codes(
    subject: Subject, names: Sequence[str], done: Callable[[], None] = lambda: None
) -> tuple[dict[str, Codes], Tensor]:
    """Compute the codes of some coders, and the mean output of the model's last block, `[D]`, over the same tokens.

    Args:
        subject: Coders, model and text.
        names: The names of these coders.
        done: Called after each batch.
    """
    last, ctx_len = _last_block(subject), subject.data.ctx_len
    at_last = subject.saes[last] if last in subject.saes and subject.sites[last].kind == "SAE" else None
    needed = [part.name for part in hookpoints_of(subject.sites[name] for name in names)]
    found: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in names}
    total_D, count = torch.zeros(1, dtype=torch.float64), 0
    with tap_all(subject.models, list(dict.fromkeys([*needed, last]))) as read:
        for numbers, input_ids, counted in subject.batches():
            places = numbers[:, None] * ctx_len + torch.arange(ctx_len)
            acts = read(input_ids.to(subject.device))
            counted = counted.to(subject.device)
            ends = counted if at_last is None else counted & at_last.counted(acts[last])
            total_D = total_D + acts[last][ends].sum(0, dtype=torch.float64).cpu()
            count += int(ends.sum())
            for name in names:
                sae, site = subject.saes[name], subject.sites[name]
                x = joined([acts[part.name] for part in site.reads])
                y = joined([acts[part.name] for part in site.writes]) if site.transcodes else None
                out = sae(x)
                fired = out.fired & (counted & sae.counted(x, y))[..., None]
                where = places[..., None].expand(fired.shape)[fired.cpu()]
                found[name].append((out.indices[fired].cpu().numpy(), where.numpy(), out.acts[fired].cpu().numpy()))
            done()
    codes = {}
    for name, parts in found.items():
        latents_P, places_P, acts_P = map(np.concatenate, zip(*parts, strict=True))
        codes[name] = Codes.of(latents_P, places_P, acts_P, subject.saes[name].num_latents, len(subject.data) * ctx_len)
    return codes, (total_D / max(1, count)).float()


def chosen(counts_M: np.ndarray, budget: int, seed: int = 0) -> np.ndarray:
    """Choose the latents that get a page: all, or the densest and a random sample of the others that fired.

    Args:
        counts_M: How often each latent fired.
        budget: How many to choose.
        seed: Seed of the sample.

    Returns:
        Indices of the latents, int64, ascending.
    """
    if len(counts_M) <= budget:
        return np.arange(len(counts_M))
    order = np.argsort(-counts_M, kind="stable")
    densest, others = order[:DENSEST], order[DENSEST:]
    others = np.random.default_rng(seed).permutation(others[counts_M[others] > 0])
    return np.sort(np.concatenate([densest, others])[:budget])


def _groups(subject: Subject, names: Sequence[str], places: int) -> Iterator[list[str]]:
    """Yield groups of layers whose codes fit into memory together."""
    group: list[str] = []
    firings = 0
    for name in names:
        own = places * subject.saes[name].k
        if group and firings + own > FIRINGS_AT_ONCE:
            yield group
            group, firings = [], 0
        group.append(name)
        firings += own
    yield group


def _features(
    subject: Subject,
    name: str,
    codes: Codes,
    ids_ST: np.ndarray,
    mean_D: Tensor,
    budget: int | None,
    scales: Sequence[float] | None,
) -> LayerFeatures:
    sae, site, ctx_len = subject.saes[name], subject.sites[name], subject.data.ctx_len
    latents_L = chosen(codes.counts_M, sae.num_latents if budget is None else budget)
    numbers = torch.from_numpy(latents_L)
    decoder_MD = sae.W_dec.detach()
    favorites, shares = codes.favorites(latents_L, ids_ST.reshape(-1), FAVORITES)
    lens, no_lens = None, None if subject.objective is None else _off_stream(subject, site)
    if subject.objective is not None and no_lens is None:
        rows_LD = decoder_MD[numbers.to(decoder_MD.device)]
        lens = logit_lens(subject.model, _last_block(subject), mean_D, rows_LD, LENS_TOKENS, ctx_len)
    norms_LH, widths = None, [part.width for part in site.writes]
    if len(widths) > 1:
        scales = scales_of(decoder_MD, widths, None) if scales is None else scales
        norms_LH = part_norms(decoder_MD[numbers.to(decoder_MD.device)], widths, scales).float().cpu()
        decoder_MD = evened(decoder_MD, widths, scales)
    near = nearest_rows(decoder_MD, numbers.to(decoder_MD.device), NEIGHBOURS)
    return LayerFeatures(
        hookpoint=name,
        counts_M=codes.counts_M,
        latents_L=latents_L,
        quantiles_L=codes.quantiles(latents_L, QUANTILES),
        histograms=codes.histograms(latents_L, BINS),
        contexts=find_contexts(codes, latents_L, ctx_len, TOP, SPREAD),
        favorites_L=favorites,
        shares_L=shares,
        neighbours=Neighbours(*(each.cpu() for each in near)),
        lens=lens,
        no_lens=no_lens,
        part_norms_LH=norms_LH,
    )


def _off_stream(subject: Subject, site: Site) -> str | None:
    """Return why a coder does not write to the residual stream, or None if it does."""
    if len(site.writes) > 1:
        return "a crosscoder writes several hookpoints, each with a part of its decoder"
    return off_stream(subject.model, site.writes[0].name)


def _last_block(subject: Subject) -> str:
    blocks = find_blocks(subject.model)
    return blocks.hookpoint(len(blocks.modules) - 1)
