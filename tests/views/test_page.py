"""What the report's file holds."""

import base64
import gzip
import json
import re

import numpy as np
import pytest
import torch

from saekit import Sae
from saekit.runs.metrics import EVALUATION, read_metrics
from saekit.views.page.charts import (
    POINTS,
    density_chart,
    evaluation_charts,
    layer_charts,
    similarity_chart,
    training_charts,
)
from saekit.views.page.packing import pack_arrays, token_texts


def unpack(text):
    """The inverse of `pack`, in Python."""
    whole = gzip.decompress(base64.b64decode(text))
    start = 4 + int.from_bytes(whole[:4], "little")
    arrays = {}
    for each in json.loads(whole[4:start]):
        kind = np.dtype(each["type"])
        planes = np.frombuffer(whole[start : start + each["bytes"]], np.uint8).reshape(kind.itemsize, -1)
        arrays[each["name"]] = planes.T.copy().view(kind).reshape(each["shape"])
        start += each["bytes"]
    return arrays


@pytest.mark.parametrize(
    ("values", "kind"),
    [([0, 255], "u1"), ([256], "u2"), ([-1, 3], "i4"), ([70_000], "i4"), ([[1], [2]], "u1"), ([], "u1")],
)
def test_integers_in_the_smallest_type(values, kind):
    array = np.array(values, dtype=np.int64)
    found = unpack(pack_arrays({"it": array}))["it"]
    assert found.dtype == np.dtype(kind)
    assert np.array_equal(found, array)


def test_integers_too_large():
    with pytest.raises(ValueError, match="no type for integers"):
        pack_arrays({"it": np.array([2**31])})


def test_floats_keep_their_first_digits():
    values = np.array([0, -1.23456789, 1e-30, 6.5504e4, np.nan, np.inf, np.finfo(np.float32).max], np.float32)
    found = unpack(pack_arrays({"it": values, "other": np.arange(3)}))["it"]
    assert found == pytest.approx(values, rel=2**-13, nan_ok=True)


def test_tokens_with_their_spaces(model_dir):
    from transformers import AutoTokenizer

    from saekit.demo import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    ids = tokenizer.encode("def the_function(self): return naïve", add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts).startswith("def the_function(self): return na")
    assert "\ufffd" not in "".join(texts)
    assert " return" in texts
    assert token_texts(tokenizer, [tokenizer.eos_token_id]) == [tokenizer.eos_token]


def test_tokens_without_a_tokenizer():
    assert token_texts(None, [5, 17]) == ["[5]", "[17]"]


def test_tokens_of_wordpiece():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "a": 1, "walk": 2, "##ing": 3, "!": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert token_texts(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [2, 3, 4]) == [" walk", "ing", "!"]


def test_curves_of_a_long_run():
    records = [
        {
            "step": n,
            "tokens": 10 * n,
            "tokens_per_second": 5.0,
            "layers": {"layers.0": {"fvu": 1 / n, "dead_fraction": None}},
        }
        for n in range(1, 10_001)
    ]
    charts = training_charts(records, ["layers.0"])
    (curve,) = charts["training-fvu"].data
    assert len(curve.x) == POINTS
    assert (curve.x[0], curve.y[0]) == (10, 1)
    assert (curve.x[-1], curve.y[-1]) == (100_000, 1e-4)
    assert set(charts["training-dead"].data[0].y) == {None}


def test_evaluations_while_training(demo_run):
    reports, found = (read_metrics(demo_run / "metrics.jsonl", kind) for kind in (None, EVALUATION))
    charts = evaluation_charts(found, reports)
    assert [record["step"] for record in found] == [6, 12, 16]
    for chart, part, metric in (("held-out-fvu", "reconstruction", "fvu"), ("held-out-ce", "grafted", "ce_recovered")):
        for number, line in enumerate(charts[chart].data):
            assert list(line.x) == [reports[step - 1]["tokens"] for step in (6, 12, 16)]
            layers = [record["evaluation"]["layers"][number] for record in found]
            assert list(line.y) == [layer[part][metric]["value"] for layer in layers]
            assert {layer["hookpoint"] for layer in layers} == {line.name}


def test_nearest_neighbours_are_all_counted():
    chart = similarity_chart({"layers.0": np.array([-0.2, 0.0, 0.31, 0.31, 1.0])})
    assert sum(chart.data[0].y) == 5
    assert chart.data[0].y[15] == 2


def test_charts_show_what_eval_json_says(evaluation):
    charts = layer_charts(evaluation)
    layers = evaluation["layers"]
    assert list(charts["layer-fvu"].data[0].x) == ["layers.0", "layers.3"]
    assert list(charts["layer-fvu"].data[0].y) == [layer["reconstruction"]["fvu"]["value"] for layer in layers]
    for chart, key in (("layer-ce", "ce_recovered"), ("layer-kl", "kl")):
        bars = charts[chart].data[0]
        wanted = [layer["grafted"][key] for layer in layers] + [evaluation["together"][key]]
        assert list(bars.x) == ["layers.0", "layers.3", "all"]
        assert list(bars.y) == [each["value"] for each in wanted]
        assert list(bars.error_y.array) == pytest.approx([each["high"] - each["value"] for each in wanted])
    density = density_chart(evaluation).data
    assert [list(line.y) for line in density] == [layer["reconstruction"]["density"]["histogram"] for layer in layers]


def element(page, name):
    return re.search(rf'<script[^>]* id="{name}">(.*?)</script>', page, re.DOTALL).group(1)


def evaluation_shown(page):
    """The numbers in the page's charts of the layers, as they were handed to it."""
    figures = json.loads(element(page, "figures"))
    return [figures[chart]["data"][0]["y"] for chart in ("layer-fvu", "layer-ce", "layer-kl")]


def evaluation_of(record):
    grafted = [*(layer["grafted"] for layer in record["layers"]), record["together"]]
    fvu = [layer["reconstruction"]["fvu"]["value"] for layer in record["layers"]]
    return [fvu, *([each[key]["value"] for each in grafted] for key in ("ce_recovered", "kl"))]


def test_the_data_on_the_page(made, evaluation, demo_run):
    page = made[0].read_text("utf-8")
    assert f"Wrote {made[0]}" in made[1]
    assert len(page) < 8e6  # of which 4.8 are the charts' library
    assert evaluation_shown(page) == evaluation_of(evaluation)
    saes = Sae.load_many((demo_run / "latest").resolve())
    for number, (name, layer) in enumerate(zip(saes, evaluation["layers"], strict=True)):
        arrays = unpack(element(page, f"layer-{number}"))
        assert len(arrays["silent"]) == layer["reconstruction"]["dead"]
        assert arrays["counts"].sum() / evaluation["tokens"] == pytest.approx(layer["reconstruction"]["l0"]["value"])
        unit = torch.nn.functional.normalize(saes[name].W_dec.detach())
        cosine = (unit @ unit.T).fill_diagonal_(-1)
        assert arrays["cosines"][:, 0] == pytest.approx(cosine.amax(1).numpy(), abs=1e-3)
        strongest = arrays["shades"][arrays["counts"] > 0, 0]
        assert (strongest.max(1) == 255).all()


def test_warnings_are_on_the_page(made, evaluation):
    (warning,) = evaluation["warnings"]
    assert warning.startswith("only 46 sequences evaluated")
    assert f'<p class="warning">{warning}</p>' in made[0].read_text("utf-8")


def test_no_text_ends_the_script(made):
    page = made[0].read_text("utf-8")
    for name in ("data", "figures"):
        assert "<" not in element(page, name)


def test_again_from_the_evaluation_that_is_there(made, evaluation, demo_run, saekit, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("evaluated again")

    monkeypatch.chdir(demo_run.parent)
    monkeypatch.setattr("saekit.views.page.build.evaluate_prepared", refuse)
    result = saekit("report", demo_run, "-o", tmp_path / "again.html", "--latents", 20)
    assert result.code == 0, result.err
    page = (tmp_path / "again.html").read_text("utf-8")
    assert evaluation_shown(page) == evaluation_of(evaluation)
    assert len(unpack(element(page, "layer-0"))["latents"]) == 10
    result = saekit("report", demo_run, "-o", tmp_path / "more.html", "--max-tokens", 2000)
    assert "evaluated again" in result.err


def test_where_it_cannot_go(demo_run, saekit, tmp_path):
    result = saekit("report", demo_run, "-o", tmp_path / "nowhere" / "page.html")
    assert result.code == 2
    assert "there is no folder" in result.err
    (tmp_path / "page.html").mkdir()
    assert saekit("report", demo_run, "-o", tmp_path / "page.html").code == 2
