"""SAEs at hookpoints of all kinds, trained together: what `saekit eval`, `report` and `splice` make of them."""

import json
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import saekit
from saekit.activations.chosen import off_stream
from saekit.analysis.eval_checkpoint import EvalOptions, prepare
from saekit.analysis.evaluate import evaluate
from saekit.analysis.features import gather_features
from saekit.analysis.inspect import inspect_path
from saekit.placement import Single
from saekit.report import Reporters
from saekit.views.page.build import build_report

NAMES = [
    "layers.0:in",
    "layers.0.mlp.down_proj:in",
    "layers.0.mlp",
    "layers.0",
    "layers.1.self_attn.o_proj:in",
    "layers.1.self_attn",
    "layers.1",
]


@pytest.fixture(scope="module")
def run(model_dir, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = {"ctx_len": 32, "max_tokens": 4096, "expansion_factor": 4, "k": 4, "layers": "0,1", "dtype": "float32"}
    saekit.train(
        model_dir,
        str(text_file),
        hookpoints="resid,layers.0:in,layers.0.mlp,layers.0.mlp.down_proj:in,layers.1.self_attn{,.o_proj:in}",
        eval_every=10**6,
        eval_tokens=512,
        save_dir=folder,
        run_name="run",
        reporter=Reporters(),
        **options,
    )
    return folder / "run"


@pytest.fixture(scope="module")
def subject(run):
    options = EvalOptions(max_tokens=512, batch_size=4)
    return prepare(run, options, Single(torch.device("cpu"))).subject


def test_they_are_evaluated_in_training_and_afterwards(run, subject):
    (line,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"evaluation"' in line)
    during = {layer["hookpoint"]: layer for layer in line["evaluation"]["layers"]}
    found = evaluate(subject)
    assert [layer.hookpoint for layer in found.layers] == sorted(NAMES)
    assert list(during) == NAMES, "in the order of a forward pass"
    assert not found.misplaced
    for layer in found.layers:
        assert layer.reconstruction.fvu.value == pytest.approx(
            during[layer.hookpoint]["reconstruction"]["fvu"]["value"], rel=1e-3
        )
        assert layer.grafted.ce_zero_ablated.value != pytest.approx(found.ce_clean.value, rel=1e-6)
        assert layer.grafted.ce_recovered.value == pytest.approx(
            during[layer.hookpoint]["grafted"]["ce_recovered"]["value"], abs=1e-2
        )


def test_an_input_is_replaced_for_the_whole_module(run, subject, model_dir):
    """What goes into block 1 is what comes out of block 0."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    half = {
        name: (lambda acts: acts / 2)
        for name in ("layers.0", "layers.1:in", "layers.1.mlp:in", "layers.1.self_attn:in")
    }
    with torch.no_grad():
        found = {}
        for name, replace in half.items():
            with saekit.splice(model, {name: replace}):
                found[name] = model(ids).logits
        assert torch.equal(found["layers.0"], found["layers.1:in"])
        x = {}
        hook = model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(
            lambda m, args: x.setdefault("in", args[0])
        )
        with saekit.splice(model, {"layers.1.mlp:in": half["layers.1.mlp:in"]}):
            model(ids)
        hook.remove()
        with saekit.tap(model, ["layers.1.mlp:in"]) as read:
            torch.testing.assert_close(x["in"], read(ids)["layers.1.mlp:in"] / 2)
        with warnings.catch_warnings(), saekit.splice(model, {name: subject.saes[name] for name in NAMES}):
            warnings.simplefilter("error")
            model(ids)
        sae = subject.saes["layers.0:in"]
        said = pytest.warns(UserWarning, match="spliced in at layers.0 was trained at layers.0:in")
        with said, saekit.splice(model, {"layers.0": sae}):
            pass
    assert list(saekit.load_many(run)) == sorted(NAMES)
    assert saekit.load(run, "layers.0.mlp.down_proj:in").trained_on.hookpoint == "layers.0.mlp.down_proj:in"


def test_the_logit_lens_is_for_what_writes_to_the_residual_stream(subject):
    reasons = {name: off_stream(subject.model, name) for name in NAMES}
    assert reasons == {
        **dict.fromkeys(NAMES),
        "layers.0.mlp.down_proj:in": "its width is 32, but that of the residual stream is 16",
        "layers.1.self_attn.o_proj:in": "it is not added to the residual stream unchanged",
    }
    for layer in gather_features(subject, 10**3).layers:
        assert (layer.lens is None) == (layer.no_lens is not None) == (reasons[layer.hookpoint] is not None)


def test_their_report_says_where_the_lens_is_left_out(run, tmp_path):
    page = tmp_path / "page.html"
    build_report(run, EvalOptions(max_tokens=256), page, Single(torch.device("cpu")), 20)
    assert '"no_lens":"its width is 32, but that of the residual stream is 16"' in page.read_text()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"transcode": True, "skip_connection": True, "layers": "0,2"}, ["layers.0.mlp", "layers.2.mlp"]),
        ({"crosscode": "resid"}, ["crosscoder"]),
    ],
)
def test_transcoders_and_crosscoders_from_training_to_the_page(model_dir, text_file, tmp_path, options, names):
    saekit.train(
        model_dir,
        str(text_file),
        **{"ctx_len": 32, "max_tokens": 4096, "expansion_factor": 4, "k": 4, "dtype": "float32", **options},
        eval_every=10**6,
        eval_tokens=512,
        save_dir=tmp_path,
        run_name="run",
        reporter=Reporters(),
    )
    run, page = tmp_path / "run", tmp_path / "page.html"
    (line,) = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"evaluation"' in line)
    build_report(run, EvalOptions(max_tokens=512), page, Single(torch.device("cpu")), 20)
    record = json.loads((run / "latest" / "eval.json").read_text())
    assert [layer["hookpoint"] for layer in record["layers"]] == names
    for layer, during in zip(record["layers"], line["evaluation"]["layers"], strict=True):
        for numbers in ("reconstruction", "skip") if "transcode" in options else ("reconstruction",):
            assert layer[numbers]["fvu"]["value"] == pytest.approx(during[numbers]["fvu"]["value"], rel=1e-3)
        assert layer["grafted"]["ce"]["value"] == pytest.approx(during["grafted"]["ce"]["value"], rel=1e-3)
        assert not any("trained at" in warning for warning in record["warnings"])
    text = page.read_text()
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    saes = saekit.load_many(run)
    inspection = inspect_path(run)
    if "transcode" in options:
        assert text.count('data-part="skip"') == 2
        assert "Transcoders read the input of the module that they are named after, and predict its output." in text
        with torch.no_grad(), saekit.splice(model, saes):
            model(ids)
        assert all(layer.kind == "transcoder" and layer.skip_norm > 0 for layer in inspection.layers)
        assert '"no_lens":null' in text
    else:
        assert [f'data-part="layers.{n}"' in text for n in range(3)] == [True] * 3
        assert '"parts":["layers.0","layers.1","layers.2"]' in text
        assert "The crosscoder reads and predicts layers.{0-2}." in text
        assert '"sharing":{' in text
        (layer,) = inspection.layers
        assert layer.sharing.by_variance
        assert sum(layer.sharing.latents) == layer.num_latents
        with pytest.raises(ValueError, match="one forward pass cannot splice it in"), saekit.splice(model, saes):
            model(ids)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("layers.0.mlp@in", "is for a width of 32, but this model's is 16"),
        ("layers.7", "does not belong to this model, whose layers are layers.0 to layers.2"),
        ("rotary_emb", "rotary_emb outputs .1, tokens, 8., not .batch, tokens, width."),
    ],
)
def test_saes_that_do_not_fit_are_refused(run, subject, tmp_path, name, says):
    from saekit.activations.chosen import check_widths
    from saekit.activations.sites import site_of
    from saekit.sae.storage import hookpoint_name

    sae = subject.saes["layers.0.mlp.down_proj:in"]
    with pytest.raises(saekit.UserError, match=says):
        check_widths(subject.models, [site_of(hookpoint_name(name), sae)])
