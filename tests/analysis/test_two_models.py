"""Crosscoders of two models: evaluations against plain code, and what their decoders say of the models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from saekit import Sae, UserError, splice, tap
from saekit.analysis.evaluate import Evaluator, evaluate
from saekit.analysis.features import gather_features
from saekit.analysis.sharing import RELATIVE_BINS, sharing
from tests.analysis.test_coders import subject

NAMES = ("layers.1", "layers.0.mlp:in")


@pytest.fixture(scope="module")
def models(model_dir):
    first = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    torch.manual_seed(1)
    config = copy.deepcopy(first.config)
    config.hidden_size = 24
    other = LlamaForCausalLM(config).eval()
    first.name_or_path = other.name_or_path = ""
    return first, other


def joined(models, name, ids):
    seen = []
    for model in models:
        with tap(model, [name]) as read:
            seen.append(read(ids)[name].clone())
    return torch.cat(seen, -1)


@pytest.fixture(scope="module")
def coders(models):
    torch.manual_seed(0)
    ids = subject(models[0], {}).data.rows
    made = {}
    for name in NAMES:
        widths = {name: 16, f"other.{name}": 24}
        made[name] = Sae(40, 48, 4, reads=widths, writes=widths).eval()
        with torch.no_grad():
            norms = joined(models, name, ids).norm(dim=-1)
            made[name].max_norm = float(norms.quantile(0.8))
            made[name].W_enc.mul_(3)
            made[name].b_dec.normal_(std=0.2)
    return made


def cross_entropy(model, ids):
    return float(F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_each_model_is_asked_with_its_part_in_place(models, coders):
    own = subject(models[0], coders, other=models[1], other_name="other")
    ids, told = own.data.rows, []
    counted = ~torch.isin(ids, own.excluded)
    evaluator = Evaluator(own)
    for again in (
        evaluator(lambda done, of: told.append((done, of))),
        evaluator(),
        evaluate(own, start_anywhere=False),
    ):
        together = [{}, {}]
        for layer in again.layers:
            name = layer.hookpoint
            x = joined(models, name, ids)
            seen = x.split([16, 24], -1)
            kept = counted & coders[name].counted(x)
            assert 0 < kept.sum() < counted.sum()
            with torch.no_grad():
                recon = coders[name](x).recon.split([16, 24], -1)
            for place, (model, part) in enumerate(zip(models, layer.parts, strict=True)):
                fvu = (seen[place] - recon[place])[kept].square().sum()
                fvu /= (seen[place] - seen[place][kept].mean(0))[kept].square().sum()
                assert part.hookpoint == ("other." if place else "") + name
                assert part.fvu.value == pytest.approx(float(fvu), rel=1e-4)
                grafted = layer.other if place else layer.grafted
                mean = seen[place][kept].mean(0)
                for value, new in (
                    (grafted.ce, recon[place]),
                    (grafted.ce_mean_ablated, mean.expand_as(recon[place])),
                    (grafted.ce_zero_ablated, torch.zeros_like(recon[place])),
                ):

                    def change(acts, new=new, kept=kept):
                        return torch.where(kept[..., None], new, acts)

                    with torch.no_grad(), splice(model, {name: change}):
                        assert value.value == pytest.approx(cross_entropy(model, ids), rel=1e-5)
                together[place][name] = lambda acts, new=recon[place], kept=kept: torch.where(
                    kept[..., None], new, acts
                )
        for place, model in enumerate(models):
            found = (again.other.together, again.other.ce_clean) if place else (again.together, again.ce_clean)
            with torch.no_grad():
                assert found[1].value == pytest.approx(cross_entropy(model, ids), rel=1e-5)
                with splice(model, together[place]):
                    assert found[0].ce.value == pytest.approx(cross_entropy(model, ids), rel=1e-5)
        assert again.to_json()["other"]["model"] == "other"
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {of for _, of in told} == {len(told)}


def test_a_second_model_without_a_head_is_read_only(models, coders):
    found = evaluate(subject(models[0], coders, other=models[1].base_model, other_name="other"))
    whole = evaluate(subject(models[0], coders, other=models[1], other_name="other"))
    assert found.other.ce_clean is found.other.together is None
    for one, other in zip(found.layers, whole.layers, strict=True):
        assert one.other is None
        assert one.grafted == other.grafted
        assert one.parts == other.parts
    assert evaluate(subject(models[0], coders, other=models[1], other_name="other", objective=None)).together is None


def test_what_does_not_fit_is_refused(models, coders):
    with pytest.raises(UserError, match=r"reads other\.layers\.1, which has a width of 24, but this model's is 16"):
        evaluate(subject(models[0], coders, other=models[0], other_name="other"))
    says = "a crosscoder of two models reads both, so it cannot be spliced into one"
    with pytest.raises(ValueError, match=says), splice(models[0], coders):
        pass


def test_features_are_of_what_both_models_have(models, coders):
    own = subject(models[0], coders, other=models[1], other_name="other")
    found = gather_features(own, 10**4, scales={name: [1.0, 2.0] for name in NAMES})
    counted = ~torch.isin(own.data.rows, own.excluded)
    for layer in found.layers:
        sae, name = coders[layer.hookpoint], layer.hookpoint
        x = joined(models, name, own.data.rows)
        with torch.no_grad():
            out = sae(x)
        fired = torch.bincount(out.indices[out.fired & (counted & sae.counted(x))[..., None]], minlength=48)
        assert torch.equal(torch.from_numpy(layer.counts_M), fired)
        parts = sae.W_dec.detach().split([16, 24], 1)
        norms_M2 = torch.stack([parts[0].norm(dim=1), 2 * parts[1].norm(dim=1)], 1)
        torch.testing.assert_close(layer.part_norms_LH, norms_M2)


def test_relative_norms_by_hand():
    """Of six latents: the first's own, the other's own, one as much in both, two nearly, and one without a row."""
    decoder = torch.tensor([[3.0, 4, 0], [0, 0, 2], [3, 4, 2.5], [0, 1, 0.4], [0, 1, 0.7], [0, 0, 0]])
    found = sharing(decoder, {"layers.1": 2, "other.layers.1": 1}, torch.tensor([1.0, 1, 2]))
    counts = dict.fromkeys((0, RELATIVE_BINS - 1, RELATIVE_BINS // 2), 1)  # r of 0, 1, 0.5
    counts |= {int(0.8 / 1.8 * RELATIVE_BINS): 1, int(1.4 / 2.4 * RELATIVE_BINS): 1}
    assert found.relative == tuple(counts.get(place, 0) for place in range(RELATIVE_BINS))
    assert [part.own for part in found.parts] == [1, 1]
    assert found.latents == (2, 3)
    assert sharing(decoder, {"layers.1": 2, "layers.2": 1}, None).relative is None
