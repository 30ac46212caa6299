"""Mixing: tokens of a step come from several times as many sequences, and nothing else changes."""

import numpy as np
import pytest
import torch

from saekit.activations.live import LiveModel
from saekit.activations.mixed import Mixed, shares
from saekit.config import SaeConfig, TrainConfig
from saekit.errors import Interrupted, UserError
from tests.training.conftest import CTX_LEN, KINDS, SETTINGS, StopAfter
from tests.training.runs import metrics_of, tensors_of

STEPS = 3
CPU = torch.device("cpu")


def opened(model, data, rank=0, ranks=1, mix=STEPS, source=None, tmp_path=None, where="auto", **options):
    cfg = TrainConfig(SaeConfig(num_latents=64, k=4), mix=mix, **{"batch_size": 8, **options})
    live = source or LiveModel(model, data, name="tiny")
    made = Mixed(live, mix, where, tmp_path) if mix > 1 else live
    made.begin(cfg, CPU, rank, ranks)
    return made


def rows(source, step):
    """A step's activations, and which of their rows are counted."""
    acts = [source(batch) for batch in source.read(step)]
    return {name: torch.cat([each.of[name] for each in acts]) for name in acts[0].of}


def as_set(x_ND):
    """Rows in an order of their own."""
    return x_ND[np.lexsort(x_ND.numpy().T)]


@pytest.mark.parametrize("sizes", [[8, 8, 8], [8, 4], [8], [5, 5, 5, 1]])
def test_each_token_is_in_one_step_and_steps_keep_their_length(sizes):
    steps_BT = shares(range(7, 307), CTX_LEN, sizes, seed=3)
    counts = torch.bincount(steps_BT.flatten(), minlength=len(sizes)).double()
    wanted = torch.tensor(sizes) / sum(sizes)
    assert counts.sum() == steps_BT.numel()
    torch.testing.assert_close(counts / counts.sum(), wanted.double(), rtol=0, atol=0.01)
    for row in steps_BT:  # every sequence is in every step, as evenly as whole tokens allow
        apart = torch.bincount(row, minlength=len(sizes)) - CTX_LEN * wanted
        assert apart.abs().max() < 1


def test_shares_depend_on_the_seed_and_the_place_alone():
    sizes = [8, 8]
    assert shares(range(5, 9), CTX_LEN, sizes, 0)[2:].equal(shares(range(7, 9), CTX_LEN, sizes, 0))
    assert not shares(range(5, 9), CTX_LEN, sizes, 0).equal(shares(range(5, 9), CTX_LEN, sizes, 1))
    one, other = shares(range(2), 1000, sizes, 0)
    assert 400 < int((one == other).sum()) < 600, "each sequence is drawn for itself"


@pytest.mark.parametrize("fixed_rows", [False, True])
def test_a_block_has_the_activations_of_its_steps(tiny_llama, tokens, tmp_path, fixed_rows):
    """The demo data has a short last step, and the last block has one step only."""
    sources = [
        opened(
            tiny_llama, tokens, mix=mix, tmp_path=tmp_path, source=LiveModel(tiny_llama, tokens, fixed_rows=fixed_rows)
        )
        for mix in (1, STEPS)
    ]
    live, mixed = sources
    with live.open(), mixed.open():
        for first in (0, 3, 6):
            steps = range(first, min(first + STEPS, live.num_steps))
            one, other = ([rows(each, step) for step in steps] for each in sources)
            for name in one[0]:
                joined = [torch.cat([each[name] for each in part]) for part in (one, other)]
                assert as_set(joined[0]).equal(as_set(joined[1])), name
            per_step = [len(each["layers.0"]) for each in other]
            assert max(per_step) - min(per_step) <= 25 or steps[-1] == live.num_steps - 1
            counts = [sum(mixed.count(batch) for batch in mixed.read(step)) for step in steps]
            assert sum(counts) == sum(live.count(batch) for step in steps for batch in live.read(step))


def test_ranks_and_micro_batches_have_the_same_tokens(tiny_llama, tokens, tmp_path):
    whole = opened(tiny_llama, tokens, tmp_path=tmp_path)
    parts = [
        opened(tiny_llama, tokens, rank, 2, tmp_path=tmp_path, batch_size=2, grad_acc_steps=2) for rank in range(2)
    ]
    with whole.open(), parts[0].open(), parts[1].open():
        for step in (1, 4, 6):
            expected = as_set(rows(whole, step)["layers.1"])
            found = as_set(torch.cat([rows(each, step)["layers.1"] for each in parts]))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert len({each.checksum(4) for each in (whole, *parts)}) == 1
        assert whole.checksum(4) != whole.checksum(3), "another share of the same block"


def test_the_language_model_runs_once_for_each_sequence(tiny_llama, tokens, tmp_path):
    live, ran = LiveModel(tiny_llama, tokens), []

    class Counted(LiveModel):
        def _run(self, batch):
            ran.append(len(batch.ids))
            return super()._run(batch)

    live.__class__ = Counted
    mixed = opened(tiny_llama, tokens, source=live, tmp_path=tmp_path)
    with mixed.open():
        for step in range(mixed.num_steps):
            for batch in mixed.read(step):
                for _ in range(2):  # the calibration looks at the first step twice
                    mixed(batch)
    assert sum(ran) == len(tokens)


def test_where_a_block_is_kept_changes_nothing(tiny_llama, tokens, tmp_path):
    sources = {
        where: opened(tiny_llama, tokens, tmp_path=tmp_path, where=where) for where in ("device", "host", "disk")
    }
    found = {}
    for where, source in sources.items():
        with source.open():
            found[where] = [rows(source, step) for step in range(5)]
            assert not list(tmp_path.iterdir()), "the file has no name"
    for step in range(5):
        for name, acts in found["device"][step].items():
            assert acts.equal(found["host"][step][name])
            assert acts.equal(found["disk"][step][name])


def test_a_system_without_posix_fallocate_has_the_file(tiny_llama, tokens, tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fallocate")
    source = opened(tiny_llama, tokens, tmp_path=tmp_path, where="disk")
    with source.open():
        assert rows(source, 0)["layers.0"].isfinite().all()


def test_a_disk_without_room_is_said_in_one_line(tiny_llama, tokens, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    source = opened(tiny_llama, tokens, tmp_path=tmp_path, where="disk")
    with source.open(), pytest.raises(UserError, match=r"--mix-in disk cannot create a file of .*No space left"):
        rows(source, 0)


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_a_mixed_run_goes_on_amid_a_block(make_trainer, kind, tmp_path):
    """To the bit: the block is read again."""
    options, sae = KINDS[kind]
    options = {**options, "sae": SaeConfig(num_latents=64, k=4, **sae), "mix": STEPS}
    make_trainer("whole", **options).fit()
    with pytest.raises(Interrupted):
        make_trainer("stopped", reporter=StopAfter(5), **options).fit()
    make_trainer("stopped", resume=True, **options).fit()
    one, other = (tensors_of(tmp_path / name / "latest") for name in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    tokens = [each["tokens"] for each in metrics_of(tmp_path / "whole") if "step" in each]
    assert len(tokens) == 7
    other_mix = make_trainer("stopped", **{**options, "mix": 2}, resume=True)
    with pytest.raises(UserError, match="--mix was 3 and is 2"):
        other_mix.fit()


def test_evaluations_between_mixed_steps_have_the_language_model(make_trainer, tokens):
    """As without mixing: the same tokens are evaluated."""
    trainer = make_trainer(mix=2)
    assert trainer.source.language_model is trainer.source.source
    assert SETTINGS["batch_size"] * 2 * CTX_LEN == trainer.source._capacity


def test_a_source_that_does_not_know_tokens_is_refused(tiny_llama, tokens, tmp_path):
    class Blind(LiveModel):
        tokens = Mixed.tokens

    source = opened(tiny_llama, tokens, tmp_path=tmp_path, source=Blind(tiny_llama, tokens))
    with pytest.raises(UserError, match="--mix needs a source that tells tokens apart"):
        source.read(0)
