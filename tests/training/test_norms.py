"""Tokens whose activations are far longer than the others': what is left out, and that nothing else changes."""

import copy
import statistics
from dataclasses import replace

import pytest
import torch

from saekit import Sae, SaeConfig, SaeTrainer, TrainConfig, UserError
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import autoencoder
from saekit.activations.tap import residual
from saekit.analysis.evaluate import evaluate
from saekit.errors import Interrupted
from saekit.report import Reporters
from saekit.sae import sae_losses
from saekit.training.state import read_calibration
from saekit.training.statistics import Tally, observe_, without_excluded
from tests.training.conftest import SETTINGS, Recorder, StopAfter
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

N, D, M, K = 30, 8, 32, 4
SINK = 7
"""A token that is embedded a thousand times as long as the others."""


@pytest.fixture(scope="module")
def sink_llama(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        model.get_input_embeddings().weight[SINK] *= 1000
    return model


@pytest.fixture
def with_sinks(sink_llama, tokens, tmp_path):
    def make(run_name="run", reporter=None, data=None, sae=None, eval_data=None, **options):
        cfg = TrainConfig(
            sae or SaeConfig(num_latents=64, k=4), save_dir=tmp_path, run_name=run_name, **{**SETTINGS, **options}
        )
        return SaeTrainer(cfg, data or tokens, sink_llama, reporter=reporter or Reporters(), eval_data=eval_data)

    return make


@pytest.mark.parametrize(
    "options", [{}, {"multi_topk": True}, {"selection": "batchtopk"}], ids=["topk", "multi", "batchtopk"]
)
@pytest.mark.parametrize("prefixes", [(), (8, M)], ids=["", "matryoshka"])
def test_loss_gradients_and_statistics_are_those_of_the_others_alone(options, prefixes):
    torch.manual_seed(0)
    sae = Sae(D, M, K, max_norm=6.0, **options).double().train()
    sae.prefixes = () if options.get("multi_topk") else prefixes
    with torch.no_grad():
        sae.b_dec += 0.4  # so that a row of zeros has a code
    x_ND = torch.randn(N, D, dtype=torch.float64)
    x_ND[::7] *= 50
    few_ND = x_ND[x_ND.norm(dim=1) <= 6.0]
    assert 0 < len(few_ND) < N
    if "selection" in options:  # just below a value of a row of zeros, or nobody would see whether such rows count
        sae.selection.threshold.copy_(0.99 * sae.encode(torch.zeros(1, D)).acts[0, 2].detach())
        assert sae(torch.zeros(1, D)).sums.all()
    dead, scale, centre_D = torch.tensor([1, 3, 5, 20]), 0.01, torch.ones(D)
    results = []
    for rows_ND in (x_ND, few_ND):
        rows_ND, counted_N1 = without_excluded(sae, rows_ND)
        out = sae(rows_ND, aux=dead).masked(counted_N1)
        losses = sae_losses(rows_ND, out, scale=scale, auxk_alpha=0.5, num_dead=4)
        tally = Tally([D], rows_ND.device)
        observe_(tally.sums_U7[0], tally.means[0], rows_ND, out, losses, torch.tensor(scale), centre_D)
        gradients = torch.autograd.grad(losses.total, list(sae.parameters()))
        fired_M = torch.bincount(out.indices[out.fired], minlength=M)
        own = torch.zeros(0) if out.sums is None else out.sums.sum(0)
        results.append((losses.total, *gradients, tally.flat, fired_M.double(), own))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_nan_is_not_taken_for_long():
    sae, x_ND = Sae(D, M, K, max_norm=6.0), torch.ones(3, D)
    x_ND[1, 2], x_ND[2, 3] = torch.nan, torch.inf
    rows_ND, counted_N1 = without_excluded(sae, x_ND)
    assert counted_N1.flatten().tolist() == [True, True, False]
    assert rows_ND.isnan().any(1).tolist() == [False, True, True], "infinity is as bad as NaN"
    assert without_excluded(Sae(D, M, K), x_ND) == (x_ND, None)
    fine_ND = torch.ones(3, D)
    assert without_excluded(sae, fine_ND, may_sync=True) == (fine_ND, None)
    assert without_excluded(sae, fine_ND)[1].all()


@pytest.mark.parametrize("multiple", [0, 10])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_first_batch_that_overflows_is_refused(with_sinks, sink_llama, multiple, value):
    def overflow(_module, _args, output):
        acts = residual(output).clone()
        acts[:, 3] = value
        return acts if isinstance(output, torch.Tensor) else (acts, *output[1:])

    handle = sink_llama.model.layers[1].register_forward_hook(overflow)
    try:
        with pytest.raises(UserError, match=r"layers\.1: NaN or Inf in the activations of the first batch"):
            with_sinks(max_norm_multiple=multiple, layers=(1,)).fit()
    finally:
        handle.remove()


def test_calibration_is_of_the_others(with_sinks, sink_llama):
    folder = with_sinks(init="fit").fit()
    (micro,) = with_sinks("again").source.read(0)
    input_ids = micro.ids
    kept = ~torch.isin(input_ids, torch.tensor([0, 1]))
    with torch.no_grad():
        hidden = sink_llama.model(input_ids, output_hidden_states=True).hidden_states
    for layer in (0, 1):  # of the last block, what is behind the final norm is in the list
        known = read_calibration(folder, [autoencoder(Hookpoint(f"layers.{layer}", 0))])[f"layers.{layer}"]
        x_ND = hidden[layer + 1][kept]
        norms = x_ND.norm(dim=1)
        assert known.max_norm == pytest.approx(10 * float(norms.median()), rel=1e-5)
        assert torch.equal(norms > known.max_norm, input_ids[kept] == SINK)
        few_ND = x_ND[norms <= known.max_norm]
        assert 0 < len(few_ND) < len(x_ND)
        torch.testing.assert_close(known.mean_D, few_ND.mean(0), rtol=1e-4, atol=1e-5)
        assert known.variance == pytest.approx(float((few_ND - few_ND.mean(0)).square().sum(1).mean()), rel=1e-4)
        assert Sae.load_from_disk(folder / f"layers.{layer}").max_norm == known.max_norm


def test_what_is_reported_is_of_the_others(with_sinks, tokens):
    watcher = Recorder()
    folder = with_sinks(reporter=watcher).fit()
    ids = torch.tensor(tokens["input_ids"])
    others = int((~torch.isin(ids, torch.tensor([0, 1, SINK]))).sum())
    fired = int(tensors_of(folder)["layers.1/state/fire_count"].sum())
    assert 3.5 * others < fired <= 4 * others
    assert all(3.5 < layer.l0 <= 4 for stats in watcher.steps for layer in stats.layers.values())
    sinks = int((ids == SINK).sum())
    shares = [[stats.layers[name].too_long for stats in watcher.steps] for name in watcher.steps[0].layers]
    assert shares[0] == shares[1] == shares[2]
    assert statistics.fmean(shares[0]) == pytest.approx(sinks / (sinks + others), rel=0.05)
    said = [message for message in watcher.said if "--max-norm-multiple" in message]
    assert len(said) == 1
    assert "in 3 of 3 layers" in said[0]
    blind = Recorder()
    with_sinks("blind", reporter=blind, max_norm_multiple=0).fit()
    assert not any("--max-norm-multiple" in message for message in blind.said)
    assert not any(layer.too_long for stats in blind.steps for layer in stats.layers.values())
    name = "layers.1"  # sinks are alike: with them nearly all of the variance is explained by one latent
    assert blind.steps[-1].layers[name].fvu < 0.5 * watcher.steps[-1].layers[name].fvu


@pytest.mark.parametrize(
    "sae", [SaeConfig(num_latents=64, k=4), SaeConfig(num_latents=64, k=4, activation="batchtopk")]
)
def test_splits_of_a_batch_end_alike(with_sinks, sae):
    whole = with_sinks("whole", sae=sae).fit()
    split = with_sinks("split", sae=sae, batch_size=2, grad_acc_steps=4, micro_acc_steps=3).fit()
    assert_same_tensors(tensors_of(split), tensors_of(whole), rtol=1e-3, atol=1e-4)


def test_evaluations_between_steps_leave_them_out_too(with_sinks, tokens):
    watcher = Recorder()
    trainer = with_sinks(
        reporter=watcher, data=tokens.select(range(40)), eval_every=2, eval_data=tokens.select([49, 50])
    )
    saes = Sae.load_many(trainer.fit())
    found = evaluate(replace(trainer.subject, saes=saes, whole=None))
    last = watcher.evaluations[-1].record
    for layer, expected in zip(last["layers"], found.layers, strict=True):
        assert layer["reconstruction"]["tokens"] == expected.reconstruction.tokens < last["tokens"]
        assert layer["reconstruction"]["fvu"]["value"] == pytest.approx(expected.reconstruction.fvu.value, rel=1e-5)
        assert layer["grafted"]["ce"]["value"] == pytest.approx(expected.grafted.ce.value, rel=1e-5)


def test_interrupted_and_resumed_equals_uninterrupted(with_sinks, tmp_path):
    whole = with_sinks("whole").fit()
    with pytest.raises(Interrupted):
        with_sinks("parts", reporter=StopAfter(3)).fit()
    assert_same_tensors(tensors_of(with_sinks("parts", resume=True).fit()), tensors_of(whole))
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
    with pytest.raises(UserError, match=r"--max-norm-multiple was 10.0 and is 0"):
        with_sinks("parts", resume=True, max_norm_multiple=0).fit()


def test_where_nothing_is_long_nothing_changes(make_trainer):
    filtered = tensors_of(make_trainer("filtered").fit())
    limits = {name: filtered.pop(name) for name in list(filtered) if name.endswith("max_norm")}
    assert len(limits) == 3
    assert_same_tensors(filtered, tensors_of(make_trainer("all", max_norm_multiple=0).fit()))
