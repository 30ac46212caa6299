"""Evaluations of SAEs, transcoders and crosscoders of a real model, against plain code."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from saekit import Sae, UserError, splice, tap
from saekit.analysis.altered import Altered
from saekit.analysis.evaluate import Evaluator, evaluate
from saekit.analysis.features import gather_features
from saekit.analysis.subject import Subject, next_token
from tests.analysis.toy import Rows

RESID = ["layers.0", "layers.1", "layers.2"]


def coder(d_in=16, d_out=16, reads=(), writes=(), **options):
    torch.manual_seed(len(options) + d_in)
    named = {"reads": dict.fromkeys(reads, 16), "writes": dict.fromkeys(writes, 16)} if reads else {}
    if options.get("transcode"):
        options["d_out"] = d_out
    sae = Sae(d_in, 48, 4, **named, **options)
    with torch.no_grad():
        sae.W_enc.mul_(3)
        for parameter in (sae.b_dec, *([sae.W_skip] if sae.W_skip is not None else [])):
            parameter.normal_(std=0.2)
    return sae.eval()


KINDS = {
    "SAE": {"layers.1": coder(), "layers.2.mlp": coder()},
    "transcoder": {f"layers.{n}.mlp": coder(transcode=True) for n in (0, 2)},
    "skip transcoder": {f"layers.{n}.mlp": coder(transcode=True, skip_connection=True) for n in (0, 2)},
    "from block to block": {"layers.2": coder(reads=["layers.0"], writes=["layers.2"], transcode=True)},
    "crosscoder": {"crosscoder": coder(48, reads=RESID, writes=RESID)},
}


@pytest.fixture(scope="module")
def model(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    model.name_or_path = ""
    return model


def subject(model, saes, **changes):
    rows = torch.randint(1, 200, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"excluded": torch.tensor([rows[0][2]]), "objective": next_token, "objective_name": "next token"}
    return Subject(model=model, saes=saes, data=Rows(*rows), **{**options, **changes})


def ends(name, sae):
    if sae.reads:
        return list(sae.reads), list(sae.writes)
    return [f"{name}:in" if sae.transcode else name], [name]


def cross_entropy(logits, ids):
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("with_limits", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_what_plain_code_finds(model, kind, with_limits):
    saes = KINDS[kind]
    own = subject(model, saes)
    ids = own.data.rows
    counted = ~torch.isin(ids, own.excluded)
    with torch.no_grad():
        clean = cross_entropy(model(ids).logits, ids)
        expected = {}
        for name, sae in saes.items():
            reads, writes = ends(name, sae)
            with tap(model, list(dict.fromkeys([*reads, *writes]))) as read:
                seen = {each: acts.clone() for each, acts in read(ids).items()}
            x, y = torch.cat([seen[each] for each in reads], -1), torch.cat([seen[each] for each in writes], -1)
            sae.max_norm = float(x.norm(dim=-1).quantile(0.8)) if with_limits else None
            sae.max_norm_out = float(y.norm(dim=-1).quantile(0.8)) if with_limits and sae.transcode else None
            kept = counted & sae.counted(x, y)
            assert kept.any()
            out = sae(x)
            predictions = {"": out.recon}
            if sae.W_skip is not None:
                predictions["skip"] = x @ sae.W_skip.T + sae.b_dec
            predictions |= {"mean": y[kept].mean(0).expand(y.shape), "zero": torch.zeros_like(y)}
            found = {}
            for what, recon in predictions.items():
                parts = zip(writes, y.split(16, -1), recon.split(16, -1), strict=True)
                new, fvus = {}, []
                for each, true, part in parts:
                    deviation = (true - true[kept].mean(0))[kept].square().sum()
                    fvus.append(float((true - part)[kept].square().sum() / deviation))
                    new[each] = lambda acts, part=part, kept=kept: torch.where(kept[..., None], part, acts)
                with splice(model, new):
                    found[what] = (cross_entropy(model(ids).logits, ids), sum(fvus) / len(fvus), fvus)
            expected[name] = (found, float((out.fired[kept]).sum() / kept.sum()), reads, writes)
        if kind != "crosscoder":
            with splice(model, saes, ~counted):
                all_at_once = cross_entropy(model(ids).logits, ids)
    evaluator = Evaluator(own)
    for again in (evaluator(), evaluator(), evaluate(subject(model, saes), start_anywhere=False)):
        assert again.ce_clean.value == pytest.approx(clean, rel=1e-5)
        for layer in again.layers:
            found, l0, reads, writes = expected[layer.hookpoint]
            assert layer.kind == kind.replace("skip ", "").replace("from block to block", "transcoder")
            assert (list(layer.reads), list(layer.writes)) == (reads, writes)
            spliced, mean, zero = (found[each] for each in ("", "mean", "zero"))
            assert layer.reconstruction.fvu.value == pytest.approx(spliced[1], rel=1e-4)
            assert layer.reconstruction.l0.value == pytest.approx(l0, rel=1e-5)
            assert layer.grafted.ce.value == pytest.approx(spliced[0], rel=1e-5)
            assert layer.grafted.ce_mean_ablated.value == pytest.approx(mean[0], rel=1e-5)
            assert layer.grafted.ce_zero_ablated.value == pytest.approx(zero[0], rel=1e-5)
            if kind == "skip transcoder":
                assert layer.skip.fvu.value == pytest.approx(found["skip"][1], rel=1e-4)
                assert layer.skip.grafted.ce.value == pytest.approx(found["skip"][0], rel=1e-5)
                recovered = (zero[0] - found["skip"][0]) / (zero[0] - clean)
                assert layer.skip.grafted.ce_recovered.value == pytest.approx(recovered, rel=1e-2)
            else:
                assert layer.skip is None
            if kind == "crosscoder":
                assert [part.hookpoint for part in layer.parts] == writes
                assert [part.fvu.value for part in layer.parts] == pytest.approx(spliced[2], rel=1e-4)
                assert again.together.ce.value == pytest.approx(spliced[0], rel=1e-5)
            else:
                assert layer.parts == ()
                assert again.together.ce.value == pytest.approx(all_at_once, rel=1e-5)


@pytest.mark.parametrize(
    ("names", "behind"),
    [
        (["layers.1"], 3),
        (["layers.2.mlp"], 3),
        (["layers.2:in"], 3),
        (["layers.1", "layers.2"], 3),
        (["layers.0.mlp"], 0),
    ],
)
@torch.no_grad()
def test_blocks_before_what_is_replaced_do_not_run(model, names, behind):
    """Of three replacements and a first try, each leaves out the blocks that nothing changes."""
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    altered, ran = Altered(model, names, start_anywhere=True), []
    clean, seen = altered.clean(ids)
    assert list(seen) == names
    new = {name: lambda acts, factor=n + 2: factor * acts for n, name in enumerate(names)}
    with splice(model, new):
        whole = model(ids).logits
    watched = model.base_model.layers[0].self_attn.register_forward_pre_hook(lambda *_: ran.append(1))
    again = [altered.logits_from(clean, new, ids) for _ in range(3)]
    slowly = Altered(model, names, start_anywhere=False).logits_from(clean, new, ids)
    watched.remove()
    assert all(torch.equal(each, whole) for each in [*again, slowly])
    assert len(ran) == 4 - behind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", ["next token", None])
def test_progress_comes_to_its_end_and_batches_do_not_matter(model, kind, objective):
    more = {} if objective else {"objective": None}
    told = []
    for sae in KINDS[kind].values():
        sae.max_norm = sae.max_norm_out = None
    one = evaluate(subject(model, KINDS[kind], batch_size=1, **more), lambda done, of: told.append((done, of)))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert {of for _, of in told} == {len(told)}
    whole = evaluate(subject(model, KINDS[kind], **more))
    for layer, other in zip(one.layers, whole.layers, strict=True):
        assert layer.reconstruction.fvu.value == pytest.approx(other.reconstruction.fvu.value, rel=1e-5)
        assert (layer.skip is None) == ("skip" not in kind)
    assert not any(math.isnan(layer.reconstruction.explained_variance.value) for layer in whole.layers)


@pytest.mark.parametrize(
    ("saes", "says"),
    [
        (
            {"layers.1.mlp": coder(16, reads=["layers.2"], writes=["layers.1.mlp"], transcode=True)},
            "layers.1.mlp reads layers.2 and predicts layers.1.mlp, but this model computes layers.1.mlp first",
        ),
        (
            {"layers.1.mlp": coder(16, reads=["layers.7"], writes=["layers.1.mlp"], transcode=True)},
            r"transcoder of layers.1.mlp reads layers.7, which does not belong to this model, whose layers are",
        ),
        (
            {"layers.1.mlp": coder(8, transcode=True)},
            "transcoder of layers.1.mlp reads layers.1.mlp:in, which has a width of 8, but this model's is 16",
        ),
        ({"layers.1.mlp": coder(16, 8, transcode=True)}, "of layers.1.mlp is for a width of 8, but this model's is 16"),
        (
            {"layers.1.mlp:in": coder(transcode=True)},
            "layers.1.mlp:in: a transcoder predicts a module's output, unless its files say",
        ),
        (
            {"layers.1/seed0": coder(), "layers.1/seed1": coder()},
            "layers.1/seed0 and layers.1/seed1 both write layers.1, so they cannot be spliced in together",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model, saes, says):
    with pytest.raises(UserError, match=says):
        evaluate(subject(model, saes))


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_each_kind(model, kind):
    """Codes are of what is read, neighbours and the lens of what is written."""
    saes = KINDS[kind]
    for sae in saes.values():
        sae.max_norm = sae.max_norm_out = None
    own = subject(model, saes)
    found = gather_features(own, 10**4, scales={"crosscoder": [1.0, 2.0, 4.0]})
    counted = ~torch.isin(own.data.rows, own.excluded)
    for layer in found.layers:
        sae = saes[layer.hookpoint]
        reads, writes = ends(layer.hookpoint, sae)
        with torch.no_grad(), tap(model, reads) as read:
            seen = read(own.data.rows)
            out = sae(torch.cat([seen[each] for each in reads], -1))
        fired = torch.bincount(out.indices[out.fired & counted[..., None]], minlength=48)
        assert torch.equal(torch.from_numpy(layer.counts_M), fired)
        rows_MHD = sae.W_dec.detach().view(48, len(writes), 16)
        if kind == "crosscoder":
            assert layer.no_lens.startswith("a crosscoder writes several hookpoints")
            rows_MHD = rows_MHD * torch.tensor([1.0, 2.0, 4.0])[:, None]
            torch.testing.assert_close(layer.part_norms_LH, rows_MHD.norm(dim=2))
        else:
            assert layer.part_norms_LH is None
            assert layer.no_lens is None
            assert layer.lens is not None
        rows_MD = F.normalize(rows_MHD.flatten(1), dim=1)
        cosine = rows_MD @ rows_MD.T - 2 * torch.eye(48)
        torch.testing.assert_close(layer.neighbours.cosines_LN[:, 0], cosine.amax(1))
