"""`saekit cache`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from saekit.cli.options import options_given, require, with_config_options
from saekit.errors import UserError

OPTIONS = frozenset(
    {"revision", "dtype", "load_in_8bit", "hf_token"}
    | {"split", "text_column", "data_args", "max_examples", "num_proc"}
    | {"hookpoints", "layers", "layer_stride"}
    | {"ctx_len", "max_tokens", "batch_size", "shuffle", "data_seed"}
)
"""The options of a run that decide what is cached."""


@partial(with_config_options, only=OPTIONS)
def cache(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Language model: a hub id or a local folder.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="Data set, as in saekit train; it is read once.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the cache. A cache that is there already is continued."),
    ] = None,
    store: Annotated[
        Literal["model", "float32", "int8"],
        typer.Option(
            "--store",
            metavar="model|float32|int8",
            help="Store activations as the model computes them, in float32, or in int8. With model, training is that "
            "of a run without a cache, to the bit. int8 has one scale per token, and an error of at most a 254th of "
            "the token's largest number.",
        ),
    ] = "model",
    compress: Annotated[bool, typer.Option("--compress", help="Compress the shards with zstd.")] = False,
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="About how large a file is, before compression.")
    ] = "256MiB",
    info: Annotated[
        Path | None, typer.Option("--info", metavar="DIR", help="Show what the cache in DIR is of, and exit.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    **options: Any,
) -> None:
    """Write a model's activations to disk, to train on them as often as wanted.

    saekit train --activations DIR then runs without the language model. Under accelerate launch every rank writes its
    own part. After a stop, the same command continues.
    """
    from saekit.cli.output import messages

    if info is not None:
        return _show(info)
    _, values = options_given(None, {"model": model, "dataset": dataset, **options})
    require(values, ("model", "dataset"), "saekit cache MODEL DATASET --out DIR")
    if out is None:
        raise UserError("--out is missing: name the folder of the cache")
    from saekit.config import RunConfig
    from saekit.hub import check_names
    from saekit.units import parse_size

    shard_bytes = parse_size("--shard-size", shard_size)

    cfg = RunConfig.from_flat(values)
    check_names(cfg.model.model, cfg.data.dataset, revision=cfg.model.revision)
    with messages().status("Loading libraries"):
        from saekit.activations import no_bars
        from saekit.placement import connect
        from saekit.placement.failure import one_error
        from saekit.training.caching import write_cache
    placement = connect("auto")
    if placement.rank:
        no_bars()

    def say(line: str) -> None:
        if placement.rank == 0:
            messages().print(line, highlight=False, soft_wrap=True)

    with one_error(placement, lambda: "the same command continues"):
        index = write_cache(cfg, out, store, compress, shard_bytes, placement, say)
    placement.close()
    say(f"{out} holds {index.sequences * index.ctx_len:,} tokens; train with saekit train --activations {out}")


def _show(folder: Path) -> None:
    """Print what a cache is of, and how much of it is there."""
    from rich.table import Table

    from saekit.cache import read_index
    from saekit.cache.index import missing_shards, shard_file
    from saekit.cli.output import results
    from saekit.units import size

    index = read_index(folder)
    there = index.num_shards - len(missing_shards(folder, index))
    files = [shard_file(folder, shard) for shard in range(index.num_shards)]
    on_disk = sum(file.stat().st_size for file in files if file.is_file())
    order = "the data set's own" if index.data_seed is None else f"random, --data-seed {index.data_seed}"
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "model": index.model + (f" at {index.revision}" if index.revision else ""),
        "data set": index.dataset,
        "hookpoints": "\n".join(f"{name} ({width})" for name, width in index.hookpoints.items()),
        "tokens": f"{index.sequences * index.ctx_len:,} in sequences of {index.ctx_len:,}",
        "order": order,
        "stored as": f"{index.store}, {index.dtype}{', compressed' if index.compressed else ''}",
        "shards": f"{there} of {index.num_shards}",
        "on disk": size(on_disk),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    results().print(table)
