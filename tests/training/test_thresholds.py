"""BatchTopK in training: where the threshold starts, how it moves, and that nothing else moves it."""

import math

import pytest
import torch

from saekit import Sae, SaeConfig, UserError
from saekit.errors import Interrupted
from saekit.sae.selection.batchtopk import GAIN, LARGEST_MOVE, NEAR_FACTOR, SMALLEST_THRESHOLD, BatchTopK
from tests.training.conftest import Recorder, StopAfter
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of, thresholds_of
from tests.training.test_bad_steps import Spoiler, explodes

K = 4
BATCH_TOPK = SaeConfig(num_latents=64, k=K, activation="batchtopk")


def test_the_first_threshold_gives_k_latents_on_average():
    rows_RD = torch.randn(60, 16)
    sae = Sae(16, 64, 8, selection="batchtopk")
    sae.fit_selection_(rows_RD, rms=1.0)
    counts = (sae.encode(rows_RD).acts > 0).sum(1)
    assert int(counts.sum()) == 8 * 60
    assert len(counts.unique()) > 1, "some tokens have more of them than others"


def test_where_few_latents_are_positive_the_threshold_is_small_and_not_zero():
    sae = Sae(16, 64, 8, selection="batchtopk")
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    sae.fit_selection_(torch.randn(60, 16), rms=2.0)
    assert float(sae.selection.threshold) == 2 * SMALLEST_THRESHOLD
    everything = Sae(16, 8, 8, selection="batchtopk")  # a token can have all of them: none is to be kept out
    everything.fit_selection_(torch.randn(60, 16), rms=2.0)
    assert float(everything.selection.threshold) == 2 * SMALLEST_THRESHOLD


def moved(threshold, *, k, firings, near, tokens, least):
    """A threshold after a step of these counts."""
    selection = BatchTopK(k, 16 * k, threshold)
    selection.move_(*map(torch.tensor, (firings, tokens)), torch.tensor([near]), rms=least / SMALLEST_THRESHOLD)
    return float(selection.threshold)


def test_how_it_moves():
    step = {"k": 4, "tokens": 100, "least": 0.5}
    near = round(3 * 440 * math.log(1.1))  # as many as make L0 fall with about the third power of the threshold
    steepness = near / 440 / math.log(1.1)
    assert moved(2.0, firings=400, near=near, **step) == 2.0
    assert moved(2.0, firings=440, near=near, **step) == pytest.approx(2 * 1.1 ** (GAIN / steepness))
    assert moved(2.0, firings=0, near=0, **step) == pytest.approx(2 * math.exp(-LARGEST_MOVE))
    assert moved(2.0, firings=1600, near=1, **step) == pytest.approx(2 * math.exp(LARGEST_MOVE))
    assert moved(0.5, firings=0, near=0, **step) == pytest.approx(0.5, rel=1e-15)
    assert moved(2.0, firings=0, near=0, k=4, tokens=0, least=0.5) == 2.0, "a step without a token says nothing"


@pytest.mark.parametrize("power", [1.5, 3, 8, 20])
@pytest.mark.parametrize("start", [0.05, 20.0])
def test_it_finds_k_however_steep_and_however_far(power, start):
    """From far off on both sides the threshold comes to where L0 is k, and stays."""

    def l0(threshold):
        return min(16.0, 4 * threshold**-power)

    threshold, found = start, []
    for _ in range(120):
        counts = [round(10_000 * l0(each * threshold)) for each in (1, NEAR_FACTOR)]
        threshold = moved(threshold, k=4, firings=counts[0], near=counts[0] - counts[1], tokens=10_000, least=1e-3)
        found.append(l0(threshold))
    assert found[-40:] == pytest.approx([4] * 40, rel=0.01)


def test_values_near_the_threshold_are_counted():
    sae = Sae(16, 64, 8, selection=BatchTopK(8, 64, 0.5)).train()
    out = sae(torch.randn(60, 16))
    assert torch.equal(out.sums, ((out.acts > 0.5) & (out.acts <= 0.5 * NEAR_FACTOR)).sum(1, keepdim=True))
    assert out.sums.any()
    assert sae.eval()(torch.randn(60, 16)).sums is None
    assert Sae(16, 64, 8).train()(torch.randn(60, 16)).sums is None


def test_mean_l0_goes_to_k(make_trainer):
    watcher = Recorder()
    make_trainer(sae=BATCH_TOPK, reporter=watcher, batch_size=2).fit()
    l0 = [layer.l0 / K for stats in watcher.steps for layer in stats.layers.values()]
    assert 0.8 < l0[0] < 1.25, "the first batch's own"
    later = l0[len(l0) // 2 :]
    assert sum(later) / len(later) == pytest.approx(1, abs=0.1)
    assert len({round(each, 6) for each in l0}) > 3, "it is a mean, and not every token's"


def test_splits_of_a_batch_end_alike(make_trainer):
    whole = make_trainer("whole", sae=BATCH_TOPK).fit()
    split = make_trainer("split", sae=BATCH_TOPK, batch_size=2, grad_acc_steps=4, micro_acc_steps=3).fit()
    assert thresholds_of(split) == pytest.approx(thresholds_of(whole), rel=1e-4)
    assert_same_tensors(tensors_of(split), tensors_of(whole), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("extra", [{}, {"optimizer": "muon", "auxk_relative_to": "residual"}], ids=["", "muon"])
@pytest.mark.parametrize("stop_at", [2, 5])
def test_interrupted_and_resumed_equals_uninterrupted(make_trainer, tmp_path, stop_at, extra):
    options = {"sae": BATCH_TOPK, "dead_feature_threshold": 100, **extra}
    whole = make_trainer("whole", **options).fit()
    with pytest.raises(Interrupted):
        make_trainer("parts", reporter=StopAfter(stop_at), **options).fit()
    between = thresholds_of((tmp_path / "parts" / "latest").resolve())
    resumed = make_trainer("parts", resume=True, **options).fit()
    assert thresholds_of(resumed) == thresholds_of(whole) != between
    assert_same_tensors(tensors_of(resumed), tensors_of(whole))
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_a_skipped_step_leaves_thresholds_as_they_are(make_trainer):
    spoiler = Spoiler({3})
    trainer = make_trainer(sae=BATCH_TOPK, reporter=spoiler, save_every=1, keep_last=9)
    explodes(trainer, spoiler, "W_dec")
    last = trainer.fit()
    seen = [thresholds_of(last.with_name(f"step_{step:08d}")) for step in (1, 2, 3, 4)]
    assert seen[1] == seen[2]
    assert all(seen[0][name] != seen[1][name] and seen[2][name] != seen[3][name] for name in seen[0])


def test_another_activation_is_another_training(make_trainer):
    make_trainer().fit()
    with pytest.raises(UserError, match="--activation was topk and is batchtopk"):
        make_trainer(sae=BATCH_TOPK, resume=True).fit()


def test_it_can_start_from_topk(make_trainer, tmp_path):
    """The threshold is fitted to the weights that the run starts from."""
    topk = make_trainer("topk").fit()
    watcher = Recorder()
    make_trainer("batchtopk", sae=BATCH_TOPK, finetune=topk, lr=1e-9, reporter=watcher).fit()
    assert watcher.steps[0].layers["layers.1"].l0 == pytest.approx(K, rel=0.02)  # no more tokens than the sample has


def test_what_is_saved_is_what_was_trained(make_trainer):
    trainer = make_trainer(sae=BATCH_TOPK)
    saes = Sae.load_many(trainer.fit())
    for name, sae in saes.items():
        assert torch.equal(sae.selection.threshold, trainer.placement.sae(name).selection.threshold)
        assert sae.max_active == 4 * K
