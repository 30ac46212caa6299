"""Caches of activations: what comes from disk trains as what the language model makes, and damage is found."""

import errno
import json
import shutil
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import saekit
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import autoencoder
from saekit.analysis.eval_checkpoint import EvalOptions, prepare
from saekit.cache import Cached, read_index
from saekit.cache.index import missing_shards, shard_file
from saekit.cache.shard import quantized
from saekit.cache.source import Places, order_of
from saekit.config import RunConfig
from saekit.config.flat import read_yaml
from saekit.errors import Interrupted, UserError
from saekit.placement import Single
from saekit.registry import SOURCES
from saekit.report import Reporters
from saekit.runs.lock import RunLock
from saekit.runs.metrics import EVALUATION, read_metrics
from saekit.training import caching, live
from saekit.training.cached import completed, open_cached
from saekit.training.caching import write_cache
from saekit.training.early import InMemory
from saekit.training.launch import train_from_config
from tests.training.conftest import StopAfter
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

T, SEQUENCES, BATCH = 16, 51, 4
HOOKPOINTS = "layers.0,layers.1.mlp:in,layers.1.mlp"
SIZES = {"num_latents": 64, "k": 4, "batch_size": BATCH, "lr": 1e-2, "ctx_len": T, "dtype": "float32"}
CPU = torch.device("cpu")
SHARD = 3 * BATCH * T * 64 * 4
"""Bytes: 12 sequences in float32."""


@pytest.fixture(scope="module")
def bin_file(tmp_path_factory):
    """A tenth of the tokens is special, which training leaves out and the cache keeps."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    np.random.default_rng(0).integers(0, 10, SEQUENCES * T, dtype=np.uint16).tofile(file)
    return file


@pytest.fixture
def make(model_dir, bin_file, tmp_path):
    """Write a cache of small shards; returns its folder."""

    def write(name="cache", store="model", compressed=False, say=lambda _: None, **options):
        values = {"model": str(model_dir), "dataset": str(bin_file), "hookpoints": HOOKPOINTS, **SIZES, **options}
        write_cache(RunConfig.from_flat(values), tmp_path / name, store, compressed, SHARD, Single(CPU), say)
        return tmp_path / name

    return write


@pytest.fixture
def train(model_dir, bin_file, tmp_path):
    def run(run_name, reporter=None, **options):
        values = {"save_dir": str(tmp_path), "run_name": run_name, **SIZES, **options}
        if "activations" not in options:
            values |= {"model": str(model_dir), "dataset": str(bin_file)}
        train_from_config(RunConfig.from_flat(completed(values)), reporter or Reporters())
        return tmp_path / run_name

    return run


KINDS = {
    "saes": {"hookpoints": HOOKPOINTS},
    "some": {"layers": "0", "exclude_tokens": "3,4", "max_tokens": 20 * T},
    "transcoder": {"hookpoints": "layers.1.mlp", "transcode": True},
    "mixed": {"hookpoints": "layers.0", "mix": 5, "mix_in": "disk"},
    "cut": {"hookpoints": "layers.0", "batch_size": 2, "grad_acc_steps": 2, "micro_acc_steps": 2},
}


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cache_trains_as_the_language_model_does(make, train, monkeypatch, compressed):
    """To the bit, whatever is trained and however often; the cut batches to rounding, for the model's are smaller."""
    folder = make(compressed=compressed)
    expected = {kind: train(f"live-{kind}", **options) for kind, options in KINDS.items()}
    monkeypatch.setattr(live, "load_model", None)  # nothing loads the language model
    for kind, options in KINDS.items():
        found = train(f"cached-{kind}", activations=str(folder), **options)
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if kind == "cut" else {}
        one, other = (tensors_of(run / "latest") for run in (found, expected[kind]))
        assert_same_tensors(one, other, **tolerance)
        if kind != "cut":
            assert metrics_of(found) == metrics_of(expected[kind])


def test_without_hookpoints_all_of_a_cache_are_trained(make, train):
    found = train("all", activations=str(make()))
    folders = {each.name for each in (found / "latest").iterdir() if each.is_dir()}
    assert folders == {"layers.0", "layers.1.mlp@in", "layers.1.mlp"}


def test_another_seed_reads_batches_in_another_order(make, train):
    index = read_index(make())
    own, other = order_of(index, 42), order_of(index, 7)
    assert own.tolist() == list(range(SEQUENCES))
    assert sorted(other) == list(range(SEQUENCES))
    assert other.tolist() != own.tolist()
    assert (np.diff(other[:48].reshape(-1, BATCH)) == 1).all(), "the sequences of a batch lie next to each other"
    with pytest.raises(UserError, match=r"--no-shuffle: the cache holds the sequences in the random order"):
        order_of(index, None)


@pytest.mark.parametrize("store", ["float32", "int8"])
def test_stored_types(make, store):
    make("whole")
    make(store, store)
    folder = make("bf16", "model", dtype="bfloat16")
    assert read_index(folder).stored_dtype == torch.bfloat16
    numbers = np.arange(SEQUENCES)
    one, other = (Places(folder.parent / each, read_index(folder.parent / each), numbers) for each in ("whole", store))
    assert one.read(numbers).equal(other.read(numbers))
    for name in read_index(folder).hookpoints:
        exact, found = one.acts(numbers, name), other.acts(numbers, name)
        assert found.dtype == torch.float32
        bound = 0 if store == "float32" else exact.abs().amax(2, keepdim=True) / 254 * (1 + 1e-5)
        assert ((found - exact).abs() <= bound).all()
        assert store == "float32" or not found.equal(exact)


def test_a_token_of_zeros_is_kept_in_int8():
    codes, scales = quantized(torch.zeros(1, 2, 3))
    assert codes.eq(0).all()
    assert scales.eq(0).all()


def test_a_cache_that_was_killed_is_continued(make, monkeypatch):
    """Amid the second shard, in the middle of its file; what was there is not written again."""
    whole = make("whole")
    write, written = caching.ShardWriter.write, []

    def killed(self, folder):
        if len(written) == 1:
            (folder / f".{shard_file(folder, 1).name}.99.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(self._shard)
        write(self, folder)

    monkeypatch.setattr(caching.ShardWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        make()
    monkeypatch.setattr(
        caching.ShardWriter, "write", lambda self, folder: (written.append(self._shard), write(self, folder))
    )
    said = []
    folder = make(say=said.append)
    assert written == [0, *range(1, read_index(folder).num_shards)]
    assert any("Continuing: 1 of 5 shards are there" in line for line in said)
    assert {file.name for file in folder.iterdir()} == {file.name for file in whole.iterdir()}
    for shard in range(5):
        assert_same_tensors(load_file(shard_file(folder, shard)), load_file(shard_file(whole, shard)))


def test_ranks_write_shards_of_their_own(make, monkeypatch):
    """Each as if it were alone; together they make the cache."""
    whole = make("whole")
    for rank in range(2):
        monkeypatch.setattr(Single, "world_size", 2)
        monkeypatch.setattr(Single, "rank", rank)
        if rank == 1:
            monkeypatch.setattr(Single, "gather", lambda self, value: [None, value])
        folder = make("parts")
        assert len(missing_shards(folder, read_index(folder))) == (2 if rank == 0 else 0)
    for shard in range(5):
        assert_same_tensors(load_file(shard_file(folder, shard)), load_file(shard_file(whole, shard)))


@pytest.mark.parametrize("compressed", [False, True])
def test_damage_is_found_where_it_is(make, train, compressed):
    folder = make(compressed=compressed)
    good = shard_file(folder, 2).read_bytes()
    for place in np.random.default_rng(0).integers(0, len(good), 12):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        shard_file(folder, 2).write_bytes(bad)
        with pytest.raises(UserError, match=r"^[^\n]*shard_000002.safetensors is damaged[^\n]*$"):
            train("flipped", activations=str(folder), overwrite=True)
    shard_file(folder, 2).write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=r"shard_000002\.safetensors is damaged"):
        train("cut", activations=str(folder))


def test_an_incomplete_cache_says_how_far_it_goes(make, train):
    folder = make()
    shard_file(folder, 3).unlink()
    with pytest.raises(UserError, match=r"1 shard of 5 missing.* --max-tokens 576"):
        train("short", activations=str(folder))
    train("short", activations=str(folder), max_tokens=576)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ctx_len": 8}, "--ctx-len is 8 and the cache has 16"),
        ({"model": "gpt2"}, "MODEL is gpt2 and the cache has"),
        ({"revision": "main"}, "--revision is main and the cache has None"),
        ({"dtype": "bfloat16"}, "--dtype is bfloat16 and the cache has float32"),
        ({"max_examples": 3}, "--max-examples is 3 and the cache has None"),
        ({"layers": "2"}, r"has no layers\.2: it has layers\.0, layers\.1\.mlp:in, layers\.1\.mlp"),
        ({"crosscode_models": "other"}, "a cache is of one language model"),
    ],
)
def test_contradictions_are_refused(make, train, options, said):
    folder = make()
    with pytest.raises(UserError, match=said):
        train("wrong", activations=str(folder), **options)


def test_other_content_is_not_continued(make, tmp_path):
    make()
    with pytest.raises(UserError, match=r"is a cache of something else .*store was 'model' and is 'int8'"):
        make(store="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="is no cache, and not empty"):
        make("full")
    (tmp_path / "cache" / "index.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="is damaged"):
        read_index(tmp_path / "cache")
    with pytest.raises(UserError, match="is no cache of activations"):
        read_index(tmp_path)


def test_a_disk_without_room_is_said_before_and_amid(make, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(caching.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
        with pytest.raises(UserError, match=r"needs .* and its disk has 1 B free"):
            make()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("saekit.cache.shard.flush", full)
    with pytest.raises(UserError, match=r"No space left on device.: make room, and the same command continues"):
        make("other")


def test_evaluations_load_the_model_and_compare_its_weights(make, train, tmp_path, model_dir, monkeypatch):
    options = {"layers": "0", "eval_every": 6, "eval_tokens": 64, "max_tokens": 30 * T}
    folder = make()
    run = train("cached", activations=str(folder), **options)
    evaluations = [
        [record["evaluation"] for record in read_metrics(run / "metrics.jsonl", EVALUATION)]
        for run in (run, train("live", **options))
    ]
    assert evaluations[0] == evaluations[1] != []
    shutil.copytree(model_dir, tmp_path / "moved")
    train("moved-model", activations=str(folder), model=str(tmp_path / "moved"), **options)
    index = read_index(folder)
    replace(index, weights="other").write(folder)
    with pytest.raises(UserError, match="has other weights now"):
        train("other", activations=str(folder), **options)


def test_an_index_of_other_values_is_damaged(make):
    """Types, and what cannot be: each in one line. What fits is found by the shards."""
    folder = make()
    index = json.loads((folder / "index.json").read_text())
    wrong = {
        "sequences": "51",
        "ctx_len": 0,
        "hookpoints": {"layers.0": None},
        "store": "zip",
        "dtype": "nn",
        "data": 3,
    }
    for name, value in wrong.items():
        (folder / "index.json").write_text(json.dumps({**index, name: value}))
        with pytest.raises(UserError, match=rf"^[^\n]*index\.json is damaged: {name}[^\n]*$"):
            read_index(folder)
    (folder / "index.json").write_text(json.dumps({**index, "data_seed": 43}))
    with pytest.raises(UserError, match=r"it is not shard 0 of the cache that index\.json describes"):
        Places(folder, read_index(folder), np.arange(1)).read(np.arange(1))


def test_a_shard_of_another_cache_is_refused(make, train):
    folder, other = make(), make("other", data_seed=7)
    shutil.copy(shard_file(other, 1), shard_file(folder, 1))
    with pytest.raises(UserError, match=r"shard_000001\.safetensors is damaged \(it is not shard 1"):
        train("foreign", activations=str(folder))


def test_changed_data_do_not_continue_a_cache(make, tmp_path):
    tokens = tmp_path / "tokens.bin"
    for seed in (0, 1):
        np.random.default_rng(seed).integers(0, 10, SEQUENCES * T, dtype=np.uint16).tofile(tokens)
        if seed == 0:
            shard_file(make(dataset=str(tokens)), 3).unlink()
    with pytest.raises(UserError, match=r"has other tokens in shard 0 than .* has now"):
        make(dataset=str(tokens))


def test_a_cache_that_was_killed_before_its_index_is_begun_again(make, tmp_path):
    folder = make("killed")
    for file in folder.glob("*.*"):
        file.unlink()
    (folder / "index.json.tmp").write_text("{")
    assert not missing_shards(make("killed"), read_index(folder))


def test_folders_that_cannot_be_used_are_said_before_the_model_is_loaded(make, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "open_live", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: give another --out"):
        make("file")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("saekit.runs.lock.write_lease", read_only)
    with pytest.raises(UserError, match=r"cannot be used \(Read-only file system\): give another --out"):
        make()


def test_one_process_writes_a_cache(make, tmp_path):
    lock = RunLock(tmp_path / "cache")
    lock.acquire()
    with pytest.raises(UserError, match=r"cache is in use: .*; wait until it ends, or stop it"):
        make()
    lock.release()
    make()


def test_the_order_is_the_caches_unless_another_is_asked_for(make):
    folder = str(make(data_seed=7))
    assert completed({"activations": folder})["data_seed"] == 7
    assert completed({"activations": folder, "data_seed": 3})["data_seed"] == 3
    assert "shuffle" not in completed({"activations": folder, "data_seed": 3})
    folder = str(make("own", shuffle=False))
    assert completed({"activations": folder})["shuffle"] is False


def test_two_threads_read_shards(make):
    """A save asks for a checksum while the next step is read."""
    folder = make()
    index = read_index(folder)
    places = Places(folder, index, np.arange(SEQUENCES))
    expected = places.read(np.arange(SEQUENCES))
    failed = []

    def read(seed):
        try:
            for number in np.random.default_rng(seed).integers(0, SEQUENCES, 300):
                assert places.read(np.array([number])).equal(expected[number : number + 1])
        except (KeyError, AssertionError, UserError) as error:
            failed.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saekit.cache.source.OPEN_SHARDS", 1)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        sys.setswitchinterval(interval)
    assert not failed


def test_an_incomplete_cache_suggests_no_beginning_where_there_is_none(make, train):
    folder = make()
    shard_file(folder, 0).unlink()
    for options in ({}, {"data_seed": 7}):
        with pytest.raises(UserError, match=r"missing\. Continue it with the same saekit cache$"):
            train("short", activations=str(folder), **options)


def test_mixing_does_not_hold_a_block_twice(make):
    index = read_index(folder := make())
    cfg = RunConfig.from_flat(completed({"activations": str(folder), **SIZES, "mix": 3})).train
    source = Cached(folder, index, tuple(autoencoder(Hookpoint(name, 64)) for name in ("layers.0",)))
    source.begin(cfg, CPU, 0, 1)
    assert [each.of for each in source.read(0)] == [None]


def test_a_resumed_run_reads_the_same_cache_wherever_it_is(make, train, tmp_path):
    folder, other = make(), make("other", store="int8")
    options = {"layers": "0", "mix": 2}
    whole = train("whole", activations=str(folder), **options)
    with pytest.raises(Interrupted):
        train("stopped", StopAfter(5), activations=str(folder), **options)
    folder.rename(tmp_path / "moved")
    for wrong in ({"activations": str(other)}, {}):
        with pytest.raises(UserError, match="has other activations than the run had"):
            train("stopped", resume="auto", **{**options, **wrong})
    found = train("stopped", activations=str(tmp_path / "moved"), resume="auto", **options)
    assert_same_tensors(tensors_of(found / "latest"), tensors_of(whole / "latest"))


def test_the_python_api_needs_no_names(make, model_dir, tmp_path):
    """A path that is spelled in another way is the same model."""
    folder = make()
    options = {"save_dir": tmp_path, "reporter": Reporters(), **SIZES, "layers": "0"}
    last = saekit.train(activations=folder, run_name="one", **options)
    other = saekit.train(f"{model_dir}/../{model_dir.name}/", activations=folder, run_name="other", **options)
    assert_same_tensors(tensors_of(last), tensors_of(other))


def test_two_sources_are_refused(monkeypatch):
    monkeypatch.setitem(SOURCES._registered, "other", None)
    values = {"model": "m", "dataset": "d", "activations": "a"}
    with pytest.raises(UserError, match=r"is for saekit\.train: give SaeTrainer a source"):
        saekit.SaeTrainer(RunConfig.from_flat(values).train, dataset=[], model=torch.nn.Identity())
    with pytest.raises(UserError, match="--activations a and --source other both say where"):
        RunConfig.from_flat({**values, "source": "other"})


def test_what_a_run_in_another_order_reads_is_not_held_out(make, train):
    """Its seed would draw other sequences from the whole data set than the cache has."""
    folder = make(max_tokens=30 * T)
    options = {"activations": str(folder), "layers": "0", "max_tokens": 16 * T, "eval_tokens": 4000}
    cached = as_set(Places(folder, read_index(folder), np.arange(30)))
    for seed, others in ((42, SEQUENCES - 16), (7, SEQUENCES - 30)):
        run = train(f"seed-{seed}", data_seed=seed, **options)
        prepared = prepare(run, EvalOptions(max_tokens=4000), Single(CPU))
        source = open_cached(configured(run, eval_every=100), Single(CPU), lambda _: None, InMemory())
        for data in (prepared.subject.data, source.language_model.eval_data):
            assert len(data) == others
            assert seed == 42 or not as_set(data) & cached


def as_set(data):
    """The sequences of a data set."""
    return {tuple(ids) for ids in data.read(np.arange(len(data))).tolist()}


def configured(run, **options):
    """The configuration of a run that was trained."""
    return RunConfig.from_flat({**read_yaml(run / "config.yaml"), **options})
