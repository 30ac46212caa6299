"""Choose the kernels of a run: `auto` gives the same on all ranks, and again when the run is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from saekit.config import TrainConfig
from saekit.placement import Placement
from saekit.runs.checkpoint import numbered
from saekit.runs.folder import goes_on
from saekit.runs.layout import INDEX_FILE, is_checkpoint
from saekit.sae.kernels import Kernels, auto_backend, choose_kernels, likely_type
from saekit.sae.kernels.fastest import Work, fastest, seconds_by_type, types


def agreed_kernels(cfg: TrainConfig, works: Sequence[Work], placement: Placement, run_dir: Path) -> Kernels:
    """Return the kernels of all units on all ranks. Collective.

    A resumed run keeps the kernels and the type that it began with, if this machine supports them.

    Args:
        cfg: Names the kernels and the type in which candidates are selected; either may be `auto`.
        works: What each unit encodes in one call. The largest decides.
        placement: The ranks.
        run_dir: The run's folder.

    Raises:
        ValueError: If the kernels or the type that the configuration names cannot run here.
    """
    began = began_with(cfg, run_dir, placement)
    backend = one_backend(placement, began.get("kernels")) if cfg.kernels == "auto" else cfg.kernels
    select: str = cfg.select_dtype
    if select == "auto" and backend != "eager":
        largest = max(works, key=lambda work: work.tokens * work.d_in * work.num_latents)
        select = _one_type(backend, largest, placement, began.get("select_dtype"))
    return choose_kernels(backend, select, placement.device)


def began_with(cfg: TrainConfig, run_dir: Path, placement: Placement) -> Mapping[str, Any]:
    """Return the resolved options in the newest checkpoint of a resumed run; empty for a new run. Collective.

    Also empty if the checkpoint cannot be read, since restoring it will raise the error.
    """
    found: dict[str, Any] = {}
    if placement.rank == 0 and goes_on(cfg, run_dir):
        with suppress(OSError, ValueError, LookupError, TypeError):
            named = cfg.resume if isinstance(cfg.resume, Path) and is_checkpoint(cfg.resume) else None
            newest = named or numbered(run_dir)[-1][0]
            found = dict(json.loads((newest / INDEX_FILE).read_text(encoding="utf-8"))["resolved"])
    return placement.gather(found)[0]


def one_backend(placement: Placement, before: str | None = None) -> str:
    """Return one name of kernels for all ranks, since they step replicas of the same SAEs. Collective.

    Args:
        placement: The ranks. If one of them has no compiler, all use torch's operations (`cpu`).
        before: The kernels that the run began with. `cpu` is kept on a CPU.
    """
    auto = auto_backend(placement.device)
    keeps_cpu = before == "cpu" and placement.device.type == "cpu"
    return _common(placement.gather("cpu" if keeps_cpu else auto), otherwise="cpu")


def _one_type(backend: str, work: Work, placement: Placement, before: str | None) -> str:
    """Return the type in which all ranks select: the one that is fastest on the slowest rank. Collective."""
    here = types(placement.device)
    if all(placement.gather(before in here)):
        return str(before)
    if not (placement.device.type == "cpu" and work.is_measured):
        return _common(placement.gather(likely_type(placement.device)), otherwise="fp32")
    everywhere = placement.gather(seconds_by_type(backend, work))
    names = [name for name in everywhere[0] if all(name in each for each in everywhere)]
    return fastest({name: max(each[name] for each in everywhere) for name in names})


def _common(names: Sequence[str], otherwise: str) -> str:
    """Return the name that all ranks gave, or `otherwise`, which all of them support."""
    return names[0] if len(set(names)) == 1 else otherwise
