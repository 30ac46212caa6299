"""What a save and a resume under zero3 take, without a GPU: fake ranks exchange fake tensors of a real run's sizes."""

import re
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saekit import Sae, TrainConfig
from saekit.placement.layer_map import LayerMap
from saekit.placement.shards import Piece
from saekit.placement.whole import SLICE
from saekit.placement.world import World
from saekit.placement.zero3 import Zero3
from saekit.runs import checkpoint
from saekit.runs.layout import STATE_FILE
from saekit.sae.model import without_memory
from saekit.training.optimizers import make_optimizer
from saekit.training.state import RunState, restore
from saekit.training.unit import Calibration

RANKS = 8
GPU = torch.device("cuda", 0)
LATENTS, WIDTH = 2**15, 2**12
MATRIX = 4 * LATENTS * WIDTH
"""Bytes of an encoder or a decoder: 512 MiB."""
MIB = 2**20


class Peaks(TorchDispatchMode):
    """The most bytes of tensors on each kind of device, of those that were made since it was entered."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self._known = Counter(), Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if torch.is_tensor(each) and (key := each.untyped_storage()._cdata) not in before | self._known:
                storage, kind = each.untyped_storage(), each.device.type
                self._known.add(key)
                self.live[kind] += storage.nbytes()
                self.most[kind] = max(self.most[kind], self.live[kind])
                weakref.finalize(storage, self._forget, key, kind, storage.nbytes())
        return out

    def _forget(self, key, kind, size):
        self._known.remove(key)
        self.live[kind] -= size


@pytest.fixture
def fake_ranks():
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    with FakeTensorMode():
        yield
    dist.destroy_process_group()


def placed(optimizer, layers, gpu=GPU, width=WIDTH, latents=LATENTS):
    """Zero3 after a step, as DeepSpeed lays it out on one of the ranks."""
    placement = Zero3(World(dist.get_rank(), RANKS, gpu, None, None, None))
    placement.gather = lambda value: [value] * RANKS  # pickles it, which fake tensors cannot bear
    placement._make_optimizer = lambda sae: make_optimizer(TrainConfig(optimizer=optimizer), sae)
    moments = ("z",) if optimizer == "signum" else ("exp_avg", "exp_avg_sq")
    placement._torch_optimizer = SimpleNamespace(state={})
    for layer in range(layers):
        placement._saes[f"h.{layer}"] = sae = without_memory(d_in=width, num_latents=latents, k=64)
        for parameter in sae.parameters():
            size = -(-parameter.numel() // RANKS)
            flat = torch.empty(size, device=gpu)
            placement._pieces[parameter] = Piece(parameter.shape, flat, flat, 0, size)
            numbers = {"weight_sum": 1.0} if optimizer == "signum" else {"step": torch.ones(())}
            placement._torch_optimizer.state[flat] = numbers | {key: torch.empty_like(flat) for key in moments}
    return placement


@pytest.mark.parametrize(("optimizer", "matrices"), [("adam", 6), ("signum", 8)])
def test_a_save_takes_two_buffers_on_the_gpu(fake_ranks, optimizer, matrices):
    """The leader of a layer needs room on its GPU for no matrix, and in memory for one layer with its state.

    That is weights and moments; for an average two more matrices, and as many again while it is made.
    """
    placement = placed(optimizer, layers=RANKS + 3)
    saved = []
    with Peaks() as peaks:
        for name, weights, tensors in placement.each_whole():
            saved.append(name)
            content = [*weights.values(), *tensors.values()]
            assert {each.device.type for each in content} == {"cpu"}
            assert sum(each.shape == (LATENTS, WIDTH) for each in content) == 6
            del weights, tensors, content
    assert saved == ["h.0", "h.8"]
    assert peaks.most["cuda"] <= 2 * 4 * SLICE + MIB
    assert peaks.most["cpu"] <= matrices * MATRIX + 16 * MIB


def test_a_layer_is_gone_before_the_next_one_is_made(tmp_path, monkeypatch):
    """Else two layers with their states would be in memory while the ranks exchange the next one."""
    monkeypatch.setattr(checkpoint, "_write_layer", lambda folder, record: [])
    monkeypatch.setattr(checkpoint, "flush", lambda path: None)
    made = []

    def layers():
        for number in range(3):
            assert [each() for each in made] == [None] * number
            record = nn.Module()
            made.append(weakref.ref(record))
            yield f"h.{number}", record
            del record

    checkpoint.write_layers(tmp_path, 1, layers())
    assert len(made) == 3


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_an_evaluation_takes_one_layers_weights(fake_ranks, monkeypatch, optimizer):
    """On every rank, and its own part of an average. NCCL would double what is gathered into a list of tensors."""
    monkeypatch.setattr(dist, "all_gather", None)
    placement = placed(optimizer, layers=1)
    with Peaks() as peaks:
        assert placement.whole_sae("h.0").device.type == "cuda"
    of_average = 2 * MATRIX // RANKS if optimizer == "signum" else 0
    assert peaks.most["cuda"] <= 2 * MATRIX + of_average + 16 * MIB


def resident():
    """Bytes of files that are mapped into this process and have been read."""
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(re.search(r"RssFile:\s+(\d+)", status)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says how much of a mapped file has been read")
@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_a_rank_reads_its_part_of_a_checkpoint(tmp_path, optimizer):
    """Of weights and moments; a page or two on each side of a part are read as well. The last rank has padding."""
    latents, width = 2**13 + 1, 2**9
    whole = Sae(width, latents, 8)
    of_one = make_optimizer(TrainConfig(optimizer=optimizer), whole)
    for parameter in whole.parameters():
        parameter.grad = torch.randn(parameter.shape)
    of_one.prepare(1)
    of_one.step()
    save_file({**of_one.export(), **of_one.state()}, tmp_path / "file")
    dist.init_process_group("fake", rank=RANKS - 1, world_size=RANKS, store=FakeStore())
    try:
        placement = placed(optimizer, 1, torch.device("cpu"), width, latents)
        tensors, before = load_file(tmp_path / "file"), resident()
        weights = {name: tensors[name] for name, _ in whole.named_parameters()}
        placement.load("h.0", weights, {name: value for name, value in tensors.items() if name not in weights})
        read = resident() - before
    finally:
        dist.destroy_process_group()
    size = (tmp_path / "file").stat().st_size
    assert size / RANKS / 2 < read < size / RANKS + 2 * MIB
    for parameter, piece in placement._pieces.items():
        name = next(name for name, each in placement.sae("h.0").named_parameters() if each is parameter)
        for key, value in of_one.optimizers[0].state[whole.get_parameter(name)].items():
            loaded = placement._torch_optimizer.state[piece.flat][key]
            if torch.is_tensor(value) and value.ndim:
                mine = value.flatten()[(RANKS - 1) * piece.size :]
                assert loaded[: len(mine)].equal(mine)
            else:
                assert loaded == value
        mine = whole.get_parameter(name).flatten()[(RANKS - 1) * piece.size :]
        assert piece.shard[: len(mine)].equal(mine)


def test_a_rank_of_a_layer_map_reads_the_layers_that_it_owns(tmp_path):
    """The other layer's files are not even there."""
    saved = Sae(4, 8, 2)
    saved.save_to_disk(tmp_path / "h.1")
    save_file({"W_enc.step": torch.ones(())}, tmp_path / "h.1" / STATE_FILE)
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        placement = LayerMap(World(1, 2, torch.device("cpu"), None, None, None))
        costs = {"h.0": 1.0, "h.1": 1.0}
        placement.place(costs, lambda _: Sae(4, 8, 2), lambda sae: make_optimizer(TrainConfig(), sae))
        bank = SimpleNamespace(
            names=placement.layers(), placement=placement, load_state=lambda *_: None, count_dead=lambda: None
        )
        numbers = dict.fromkeys(
            ["step", "tokens", "skipped_steps", "bad_steps_in_row", "evaluated_step", "best_fvu"], 1
        )
        known = {name: Calibration(torch.zeros(4), 1.0) for name in costs}
        restore(tmp_path, {**numbers, "hookpoints": ["h.0", "h.1"]}, RunState(calibration=known), bank)
    finally:
        dist.destroy_process_group()
    assert placement.sae("h.1").W_enc.equal(saved.W_enc)
