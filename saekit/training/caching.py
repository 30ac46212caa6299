"""Writes a cache of activations: runs the language model once over the data, and writes every hookpoint to disk."""

from __future__ import annotations

import operator
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash

from saekit._version import __version__
from saekit.activations import find_blocks, model_shape
from saekit.activations.live import LiveModel
from saekit.activations.lm import excluded_tokens
from saekit.cache.index import INDEX, MODEL, Index, missing_shards, read_index
from saekit.cache.shard import ShardReader, ShardWriter, remove_partial
from saekit.config import ModelConfig, RunConfig
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.runs.lock import InUse, RunLock
from saekit.training.early import InMemory
from saekit.training.live import open_live
from saekit.units import duration, size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAUSE = 10.0
"""Seconds between two lines of progress."""
Say = Callable[[str], None]


def write_cache(
    cfg: RunConfig, out: Path, store: str, compressed: bool, shard_bytes: int, placement: Placement, say: Say
) -> Index:
    """Run the language model over the data and write its activations. Collective: every rank writes its own shards.

    An existing cache is continued: only missing shards are written.

    Args:
        cfg: The run. Only the model, the data, the hookpoints, the context, the batch size and the order of the
            sequences matter.
        out: The folder of the cache.
        store: See `saekit.cache.index.STORES`.
        compressed: Whether shards are compressed (zstd).
        shard_bytes: About how large a shard is, before compression; a rank has several in memory.
        placement: The ranks.
        say: Receives progress messages.

    Returns:
        The index of the cache.

    Raises:
        UserError: If the folder holds another cache or something else, or the disk does not have enough space.
    """
    if cfg.train.crosscode_models is not None:
        raise UserError("--crosscode-models: a cache is of one language model")
    # Every token is stored. Training decides which of them are excluded.
    train = replace(
        cfg.train, exclude_tokens=(), exclude_special_tokens=False, eval_every=None, grad_acc_steps=1, mix=1
    )
    _on_first_rank(placement, out, lambda: _check_folder(out))
    with _locked(out, placement):
        live = open_live(replace(cfg, train=train), placement, say, InMemory())
        live.begin(train, placement.device, 0, 1)
        index = _index(cfg, live, store, compressed, shard_bytes)
        _on_first_rank(placement, out, lambda: _begin(out, index, live, cfg.model, say))
        mine = [shard for shard in missing_shards(out, index) if shard % placement.world_size == placement.rank]
        remove_partial(out, mine)
        _write(out, index, live, mine, say)
        placement.gather(None)
    return index


@contextmanager
def _locked(out: Path, placement: Placement) -> Iterator[None]:
    """Hold the lock of a cache's folder for all ranks: two commands would delete each other's unfinished shards."""
    lock = RunLock(out.resolve())

    def take() -> None:
        try:
            lock.acquire()
        except InUse as other:
            raise UserError(f"{out} is in use: {other}; wait until it ends, or stop it") from None

    _on_first_rank(placement, out, take)
    try:
        yield
    finally:
        if placement.rank == 0:
            lock.release()


def _index(cfg: RunConfig, live: LiveModel, store: str, compressed: bool, shard_bytes: int) -> Index:
    train, batch = cfg.train, cfg.train.batch_size
    special = excluded_tokens(
        replace(train, exclude_tokens=(), exclude_special_tokens=True), live.model, live.tokenizer
    )
    depth = len(find_blocks(live.model).modules)
    index = Index(
        model=cfg.model.model,
        revision=cfg.model.revision,
        dataset=cfg.data.dataset,
        data={name: getattr(cfg.data, name) for name in OF_DATA},
        ctx_len=live.ctx_len,
        sequences=live.num_sequences,
        data_seed=train.order_seed,
        batch_size=batch,
        shard_sequences=batch,
        hookpoints={each.name: each.width for each in live.hookpoints},
        store=store,
        compressed=compressed,
        dtype=str(live.dtype).removeprefix("torch."),
        special_tokens=special,
        vocabulary=live.vocabulary,
        depth=depth,
        weights=weights_checksum(live.model, depth),
        saekit_version=__version__,
    )
    batches = max(1, shard_bytes // (batch * index.ctx_len * index.bytes_per_token))
    return replace(index, shard_sequences=batch * batches)


OF_DATA = ("split", "text_column", "data_args", "max_examples")
"""Options of a data set that decide which tokens it has."""
MAY_DIFFER = ("saekit_version",)
"""Entries of the index that may differ between the saekit that began a cache and the one that continues it."""


def _on_first_rank(placement: Placement, out: Path, work: Callable[[], None]) -> None:
    """Do something on one rank; its error is raised on all of them. Collective."""
    failed = None
    if placement.rank == 0:
        try:
            work()
        except UserError as error:
            failed = str(error)
        except OSError as error:
            failed = f"{out} cannot be used ({error.strerror or error}): give another --out"
    failed = placement.gather(failed)[0]
    if failed is not None:
        raise UserError(failed)


def _check_folder(out: Path) -> None:
    """Refuse a folder that cannot become a cache, before data and model are loaded."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give another --out")
    # A process that was killed before the index was there leaves the model's config, and a lock.
    began = {MODEL, f"{INDEX}.tmp"}
    there = {each.name for each in out.iterdir() if not each.name.startswith(".")} if out.exists() else set()
    if there - began and INDEX not in there:
        raise UserError(f"{out} is no cache, and not empty: give another --out")


def _begin(out: Path, index: Index, live: LiveModel, model: ModelConfig, say: Say) -> None:
    """Write the index, or check that an existing folder holds the same cache."""
    if (out / INDEX).exists():
        before, now = vars(read_index(out)), vars(index)
        names = [name for name in now if name not in MAY_DIFFER and now[name] != before[name]]
        if names:
            changed = "; ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names)
            raise UserError(f"{out} is a cache of something else ({changed}): give another --out")
        _check_tokens(out, index, live)
    there = index.num_shards - len(missing_shards(out, index))
    left = 1 - there / index.num_shards
    needed, free = round(index.total_bytes * left), shutil.disk_usage(out).free
    compressed = ", less after compression" if index.compressed else ""
    say(f"{index.sequences * index.ctx_len:,} tokens of {len(index.hookpoints)} hookpoints: {size(needed)}{compressed}")
    if there:
        say(f"Continuing: {there} of {index.num_shards} shards are there")
    if needed > free and not index.compressed:
        raise UserError(
            f"{out} needs {size(needed)}, and its disk has {size(free)} free: store less with --max-tokens, fewer "
            "--hookpoints or --store int8"
        )
    if not (out / INDEX).exists():
        model_shape(model).config.save_pretrained(out / MODEL)
        index.write(out)


def _check_tokens(out: Path, index: Index, live: LiveModel) -> None:
    """Compare the token ids of the first and the last shard that are there with those that would be written now."""
    missing = set(missing_shards(out, index))
    there = [shard for shard in range(index.num_shards) if shard not in missing]
    for shard in sorted({*there[:1], *there[-1:]}):
        places = index.places(shard)
        (batch,) = live.read(places.start // index.batch_size)
        if not ShardReader(out, index, shard).ids(range(len(batch.ids))).equal(batch.ids):
            raise UserError(
                f"{out} has other tokens in shard {shard} than {index.dataset} has now: give another --out, or delete "
                "the cache"
            )


def _write(out: Path, index: Index, live: LiveModel, mine: Sequence[int], say: Say) -> None:
    """Make the shards one by one. A thread writes each shard while the language model makes the next one."""
    began = said = time.monotonic()
    with live.open(), ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache") as disk:
        writing: Future[None] | None = None
        for number, shard in enumerate(mine, 1):
            filling = ShardWriter(index, shard)
            places = index.places(shard)
            for step in range(places.start // index.batch_size, -(-places.stop // index.batch_size)):
                for batch in live.read(step):
                    filling.add(batch.ids, live(batch).of)
            _finish(writing, out)
            writing = disk.submit(filling.write, out)
            if time.monotonic() - said > PAUSE or number == len(mine):
                said = time.monotonic()
                rate = number / (said - began)
                tokens = rate * index.shard_sequences * index.ctx_len
                left = duration((len(mine) - number) / rate)
                say(f"{number} of {len(mine)} shards, {tokens:,.0f} tokens/s, {left} left")
        _finish(writing, out)


def _finish(writing: Future[None] | None, out: Path) -> None:
    if writing is None:
        return
    try:
        writing.result()
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}): make room, and the same command continues"
        ) from error


def weights_checksum(model: PreTrainedModel, depth: int) -> str:
    """Return a checksum of the weights of a language model's first `depth` blocks and of its token embeddings.

    It does not depend on other loaded weights, such as later blocks or a head.
    """
    blocks = find_blocks(model)
    counted = tuple(f"{blocks.hookpoint(layer)}." for layer in range(depth))
    named = [each for each in model.base_model.named_parameters() if each[0].startswith(counted)]
    digest = xxhash.xxh3_128()
    for name, parameter in (
        ("embeddings", model.get_input_embeddings().weight),
        *sorted(named, key=operator.itemgetter(0)),
    ):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
