"""A run that trains on a cache of activations (`--activations`), from its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saekit.activations import ModelShape, model_shape
from saekit.activations.chosen import chosen, names_none
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.live import LiveModel
from saekit.activations.patterns import fold
from saekit.activations.sites import Site, autoencoder, hookpoints_of
from saekit.cache import Cached, Index, read_index, read_options
from saekit.cache.index import MODEL
from saekit.config import ModelConfig, RunConfig
from saekit.errors import UserError
from saekit.hub import is_path, path_of
from saekit.placement import Placement
from saekit.training.caching import weights_checksum
from saekit.training.early import InMemory, check_units
from saekit.training.live import open_live


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's options with those that its cache decides, where they were not given.

    These are the names of model and data set, and the order of the sequences.

    Raises:
        UserError: If there is no cache.
    """
    if not isinstance(values.get("activations"), str | os.PathLike):  # none, or what the configuration will refuse
        return dict(values)
    index = read_index(Path(values["activations"]).expanduser())
    known = {"model": index.model, "revision": index.revision, "dataset": index.dataset, **index.data}
    if not {"shuffle", "data_seed"} & values.keys():
        known |= index.order_options
    return {**{name: value for name, value in known.items() if value is not None}, **values}


def open_cached(cfg: RunConfig, placement: Placement, say: Callable[[str], None], have: InMemory) -> Cached:
    """Open the cache that the configuration names. The language model is loaded only for `eval_every`.

    Args:
        cfg: The run.
        placement: The ranks.
        say: Told what is done.
        have: What the caller has loaded already.

    Raises:
        UserError: If there is no cache, or it contradicts the configuration.
    """
    train = cfg.train
    if train.activations is None:
        raise UserError("--source cached needs --activations, the folder of a cache that saekit cache has made")
    folder, index = cache_of(cfg, train.activations)
    sites = sites_in(cfg, index, folder)
    check_units(cfg, placement, sites)
    tokens = index.sequences * index.ctx_len
    say(f"Reading activations from {folder}: {tokens:,} tokens of {index.model} on {index.dataset}")
    live = None
    if train.eval_every is not None:
        reads = replace(train, ctx_len=index.ctx_len, **read_options(index, train))
        live = open_live(replace(cfg, train=reads), placement, say, have)
        _check_weights(live, index, folder)
    return Cached(folder, index, sites, live)


def cache_of(cfg: RunConfig, activations: Path) -> tuple[Path, Index]:
    """Return the folder of a run's cache, and what it is of.

    Raises:
        UserError: If there is no cache, or it contradicts the configuration.
    """
    folder = activations.expanduser()
    index = read_index(folder)
    _refuse_contradictions(cfg, index, folder)
    return folder, index


def shape_in(folder: Path) -> ModelShape:
    """Return the shape of the language model whose activations a cache holds."""
    return model_shape(ModelConfig(str(folder / MODEL)))


def _refuse_contradictions(cfg: RunConfig, index: Index, folder: Path) -> None:
    asked: dict[str, tuple[Any, Any]] = {}
    if cfg.train.eval_every is None:  # else the weights are compared, and the model may have been moved
        asked["MODEL"] = (_place(cfg.model.model), _place(index.model))
        asked["--revision"] = (cfg.model.revision, index.revision)
    asked |= {
        "DATASET": (_place(cfg.data.dataset), _place(index.dataset)),
        "--ctx-len": (cfg.train.ctx_len or index.ctx_len, index.ctx_len),
    }
    if cfg.model.dtype != "auto":
        asked["--dtype"] = (cfg.model.dtype, index.dtype)
    for name, value in index.data.items():
        asked[f"--{name.replace('_', '-')}"] = (getattr(cfg.data, name), value)
    wrong = [f"{name} is {given} and the cache has {there}" for name, (given, there) in asked.items() if given != there]
    if wrong:
        raise UserError(f"--activations {folder}: {'; '.join(wrong)}. Leave these out, or make another cache")
    if cfg.train.crosscode_models is not None:
        raise UserError("--crosscode-models: a cache is of one language model, so leave out --activations")


def _place(name: str) -> str:
    """Return a name of which every spelling of the same path has one."""
    return os.path.realpath(path_of(name)) if is_path(name) else name


def sites_in(cfg: RunConfig, index: Index, folder: Path) -> tuple[Site, ...]:
    """Return what coders read and write: as asked, or an SAE of each hookpoint that is there.

    Raises:
        UserError: If the cache has not all of it.
    """
    train = cfg.train
    if names_none(train) and train.layers is None and train.layer_stride == 1:
        return tuple(autoencoder(Hookpoint(name, width)) for name, width in index.hookpoints.items())
    sites = chosen(train, shape_in(folder)).sites
    missing = [each.name for each in hookpoints_of(sites) if each.name not in index.hookpoints]
    if missing:
        there = ", ".join(fold(list(index.hookpoints)))
        raise UserError(f"--activations {folder} has no {', '.join(fold(missing))}: it has {there}")
    return sites


def _check_weights(live: LiveModel, index: Index, folder: Path) -> None:
    if weights_checksum(live.model, index.depth) != index.weights:
        raise UserError(
            f"--eval-every: {index.model} has other weights now than those whose activations are in {folder}"
        )
