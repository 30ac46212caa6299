"""Records of `metrics.jsonl` as what reporters are told: the way back from `metrics`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from saekit.errors import UserError
from saekit.report.stats import EvalStats, LayerStats, Lowest, RunInfo, StepStats
from saekit.runs.layout import INDEX_FILE, LATEST
from saekit.units import UNKNOWN

LISTS = ("hookpoints", "widths", "latents")
"""Fields of `RunInfo` that are tuples."""
NUMBERS = ("fvu", "l0", "loss", "auxk_loss", "too_long")
"""Fields of `LayerStats` that are null where they were not finite; `multi_topk_fvu` is also null without Multi-TopK."""


def info_of(record: Mapping[str, Any], run_dir: Path) -> RunInfo:
    """Return what is known of a run, from the record of a start (`as_start`).

    Raises:
        UserError: If another version of saekit has written it, with too little.
    """
    known = {each.name for each in fields(RunInfo)}
    run = {name: value for name, value in record["run"].items() if name in known}
    run |= {name: tuple(run[name]) for name in LISTS if name in run}
    try:
        return RunInfo(run_dir=run_dir, config={}, **run)
    except TypeError:
        raise UserError(f"{run_dir}: another version of saekit trains this run; watch it with that version") from None


def info_of_checkpoint(run_dir: Path) -> RunInfo | None:
    """Return what the newest checkpoint says of a run whose `metrics.jsonl` has no start; None without a checkpoint.

    Versions before `saekit watch` wrote such files. On what device and over how many ranks they trained is not known.
    """
    try:
        index = json.loads((run_dir / LATEST / INDEX_FILE).read_text(encoding="utf-8"))
        config, resolved, names = index["config"], index["resolved"], tuple(index["hookpoints"])
        return RunInfo(
            run_dir=run_dir,
            model=index["model"],
            dataset=index["dataset"],
            hookpoints=names,
            widths=_of_each(resolved["d_in"], names),
            latents=_of_each(resolved["num_latents"], names),
            k=config["k"],
            total_steps=index["schedule"]["total_steps"],
            total_sequences=index["data"]["sequences"],
            ctx_len=index["ctx_len"],
            start_step=0,
            device=UNKNOWN,
            placement=config["placement"],
            dtype=config["dtype"],
            global_batch=resolved["global_batch"],
            config={},
            kernels=resolved["kernels"],
            select_dtype=resolved["select_dtype"],
            eval_every=config.get("eval_every"),
            activation=config["activation"],
            with_auxk=config["auxk_alpha"] > 0,
        )
    except (OSError, ValueError, KeyError, TypeError):  # it is being replaced, or has yet to come
        return None


def _of_each(value: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(value[name] if isinstance(value, dict) else value for name in names)


def stats_of(record: Mapping[str, Any]) -> StepStats:
    """Return the report that a record holds (`as_record`). What was not finite is NaN."""
    return StepStats(
        step=record["step"],
        tokens=record["tokens"],
        tokens_per_second=_number(record["tokens_per_second"]),
        learning_rate=_number(record["learning_rate"]),
        memory_bytes=record["memory_bytes"],
        layers={name: _layer_of(layer) for name, layer in record["layers"].items()},
        skipped_steps=record["skipped_steps"],
        bad_in_row=record.get("bad_in_row", 0),
        diverged={
            name: None if lowest is None else Lowest(*lowest) for name, lowest in record.get("diverged", {}).items()
        },
    )


def _layer_of(layer: Mapping[str, Any]) -> LayerStats:
    return LayerStats(
        dead=layer["dead"],
        num_latents=layer["num_latents"],
        multi_topk_fvu=layer["multi_topk_fvu"],
        **{name: _number(layer[name]) for name in NUMBERS},
    )


def evaluation_of(record: Mapping[str, Any]) -> EvalStats:
    """Return the evaluation that a record holds (`as_evaluation`). Values that were not finite are NaN."""
    return EvalStats(record["step"], _number(record["seconds"]), _with_nan(record["evaluation"]))


def _with_nan(value: Any) -> Any:
    """Put NaN where an estimate has no value; its bounds may be null for other reasons."""
    if isinstance(value, dict):
        return {name: math.nan if name == "value" and each is None else _with_nan(each) for name, each in value.items()}
    return [_with_nan(each) for each in value] if isinstance(value, list) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
