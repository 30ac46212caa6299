"""Features of real SAEs on a real language model, against the plain computation."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from saekit.activations import tap
from saekit.analysis.eval_checkpoint import EvalOptions, prepare
from saekit.analysis.evaluate import evaluate
from saekit.analysis.features import gather_features, read_codes
from saekit.analysis.lens import logit_lens
from saekit.analysis.measure import nearest_rows
from saekit.placement import Single


@pytest.fixture(scope="module")
def subject(demo_run):
    return prepare(demo_run, EvalOptions(max_tokens=1500, batch_size=4), Single(torch.device("cpu"))).subject


@pytest.fixture(scope="module")
def features(subject):
    return gather_features(subject, 10**6)


def dense(subject, name):
    """Activations `[places, latents]` of one SAE, and the model's residual stream there."""
    ids = subject.data.read(np.arange(len(subject.data)))
    with torch.inference_mode(), tap(subject.model, [name]) as read:
        x = read(ids)[name].float()
        out = subject.saes[name](x)
    table = torch.zeros(ids.numel(), subject.saes[name].num_latents)
    table.scatter_(1, out.indices.flatten(0, 1), out.acts.flatten(0, 1))
    kept = ~torch.isin(ids, subject.excluded).flatten()
    return (table * kept[:, None]).numpy(), x.flatten(0, 1)[kept]


def test_codes_are_those_of_the_saes(subject, features):
    for layer in features.layers:
        table, _ = dense(subject, layer.hookpoint)
        # Another batch size may round a near-tie the other way; what fires is the same but for such.
        assert np.abs(layer.counts_M - (table > 0).sum(0)).sum() <= 1e-4 * (table > 0).sum()
        fired = table.max(0) > 0
        assert layer.quantiles_L[fired, -1] == pytest.approx(table.max(0)[fired], rel=1e-4)
        best = layer.contexts.places_LC[fired, 0]
        assert table[best, np.flatnonzero(fired)] == pytest.approx(table.max(0)[fired], rel=1e-4)
    ids = subject.data.read(np.arange(len(subject.data)))
    assert np.array_equal(features.ids_ST, ids.numpy())


def test_they_agree_with_the_evaluation(subject, features):
    found = evaluate(subject)
    for layer, result in zip(features.layers, found.layers, strict=True):
        assert layer.hookpoint == result.hookpoint
        assert int((layer.counts_M == 0).sum()) == result.reconstruction.dead
        assert layer.counts_M.sum() / found.tokens == pytest.approx(result.reconstruction.l0.value)


def test_what_is_too_long_fires_nothing(subject):
    name = next(iter(subject.saes))
    ids = subject.data.read(np.arange(len(subject.data)))
    with torch.inference_mode(), tap(subject.model, [name]) as read:
        norms = read(ids)[name].float().norm(dim=-1).flatten()
    limit = float(norms.median())
    saes = {each: copy.copy(sae) for each, sae in subject.saes.items()}
    saes[name].max_norm = limit
    found, _ = read_codes(replace(subject, saes=saes), [name])
    whole, _ = read_codes(subject, [name])
    at = whole[name].places_P
    assert np.array_equal(found[name].places_P, at[(norms <= limit).numpy()[at]])
    assert len(found[name].places_P) < 0.9 * len(at)


def test_in_groups_of_layers_as_all_at_once(subject, features, monkeypatch):
    monkeypatch.setattr("saekit.analysis.features.FIRINGS_AT_ONCE", 1)
    seen = []
    apart = gather_features(subject, 10**6, lambda done, of: seen.append((done, of)))
    assert seen == [(done, seen[-1][1]) for done in range(1, seen[-1][1] + 1)]
    for one, other in zip(apart.layers, features.layers, strict=True):
        assert np.array_equal(one.contexts.places_LC, other.contexts.places_LC)
        assert torch.equal(one.lens.promoted_LN, other.lens.promoted_LN)


def test_a_budget_is_shared_by_the_layers(subject):
    few = gather_features(subject, 100)
    for layer in few.layers:
        assert len(layer.latents_L) == 50
        assert len(layer.counts_M) == 256
        assert layer.counts_M[layer.latents_L].max() == layer.counts_M.max()
        assert len(layer.contexts.places_LC) == len(layer.neighbours.latents_LN) == 50


def test_the_lens_of_a_model_with_rms_norm(subject):
    """The derivative worked out by hand: logits = U (γ ⊙ x / rms(x))."""
    model, name = subject.model, next(iter(subject.saes))
    _, mean_D = read_codes(subject, [name])
    with torch.inference_mode(), tap(model, ["layers.5"]) as read:
        ids = subject.data.read(np.arange(len(subject.data)))
        x_ND = read(ids)["layers.5"].float()[~torch.isin(ids, subject.excluded)]
    assert torch.allclose(mean_D, x_ND.mean(0), atol=1e-5)

    rows_LD = subject.saes[name].W_dec.detach()[:30]
    x, norm = x_ND.mean(0).clone(), model.base_model.norm
    rms = (x.square().mean() + norm.variance_epsilon).sqrt()
    along = rows_LD / rms - x * (rows_LD @ x)[:, None] / (len(x) * rms**3)
    rise_LV = (along * norm.weight) @ model.get_output_embeddings().weight.T
    rise_LV = rise_LV - rise_LV.mean(1, keepdim=True)

    found = logit_lens(model, "layers.5", x, rows_LD, 6, ctx_len=8)
    assert torch.allclose(found.rises_LN, rise_LV.topk(6).values, rtol=1e-3, atol=1e-5)
    assert torch.allclose(found.falls_LN, -(-rise_LV).topk(6).values, rtol=1e-3, atol=1e-5)
    assert torch.allclose(rise_LV.gather(1, found.promoted_LN), found.rises_LN, rtol=1e-3, atol=1e-5)
    assert torch.allclose(rise_LV.gather(1, found.suppressed_LN), found.falls_LN, rtol=1e-3, atol=1e-5)


def test_no_lens_without_a_head(subject):
    assert gather_features(replace(subject, objective=None), 10).layers[0].lens is None


@pytest.mark.parametrize("num_latents", [1, 3, 200])
def test_nearest_rows(num_latents, monkeypatch):
    monkeypatch.setattr("saekit.analysis.measure.rows_at_a_time", lambda count: 7)
    rows = torch.randn(num_latents, 5, generator=torch.Generator().manual_seed(0))
    rows[0] = 0
    some = torch.arange(num_latents - 1, -1, -2)
    found = nearest_rows(rows, some, 8)
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    cosine.fill_diagonal_(-2)
    wanted = cosine[some].topk(min(8, num_latents - 1))
    assert torch.allclose(found.cosines_LN, wanted.values, atol=1e-6)
    assert torch.allclose(cosine[some].gather(1, found.latents_LN), wanted.values, atol=1e-6)
