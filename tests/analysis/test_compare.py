"""Two checkpoints side by side."""

import json

import pytest
import torch

from saekit import Sae, UserError
from saekit.analysis.compare import compare, shared_rows
from saekit.analysis.inspect import inspect_path
from saekit.runs.layout import EVAL_FORMAT
from saekit.views.comparison import comparison_to_json, render_comparison


def test_shared_rows_by_hand():
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    second = torch.tensor([[5.0, 0.0], [0.0, -1.0], [0.8, 0.6]])
    of_first, of_second = shared_rows(first, second)
    # Nearest cosines: 1 to (5, 0); 0.6 and 0.96 to (0.8, 0.6); of a row of zeros 0.
    assert of_first.mean == pytest.approx((1 + 0.6 + 0.96 + 0) / 4)
    assert of_first.share == 0.5
    # (0, -1) has nothing nearer than (1, 0) and the row of zeros, at 0.
    assert of_second.mean == pytest.approx((1 + 0 + 0.96) / 3)
    assert of_second.share == pytest.approx(2 / 3)


def test_pieces_and_samples(monkeypatch):
    torch.manual_seed(0)
    first, second = torch.randn(50, 8), torch.randn(70, 8)
    expected = shared_rows(first, second)
    monkeypatch.setattr("saekit.analysis.compare.rows_at_a_time", lambda _: 7)
    found = shared_rows(first, second)
    for one, other in zip(found, expected, strict=True):
        assert one.mean == pytest.approx(other.mean)
        assert one.share == other.share
    # A budget of 10 of the first's rows: the first and the last one are among them.
    sampled, _ = shared_rows(first, torch.stack([first[0], first[49]]), budget=2 * 8 * 2)
    assert sampled.share == 1


@pytest.fixture
def pair(tmp_path):
    """Two checkpoints of two layers, of which one is in both; half of B's latents there are A's."""
    torch.manual_seed(0)
    a, b = Sae(16, 32, 4), Sae(16, 64, 8)
    b.W_dec.data[:32] = a.W_dec.data
    for name, saes in (("a", {"layers.0": a, "layers.1": a}), ("b", {"layers.1": b, "layers.2": b})):
        for hookpoint, sae in saes.items():
            sae.save_to_disk(tmp_path / name / hookpoint)
            about = {"hookpoint": hookpoint, "fvu": 0.25 if name == "a" else 0.125, "tokens": 1000}
            (tmp_path / name / hookpoint / "saekit.json").write_text(json.dumps(about), encoding="utf-8")
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize(
    ("limits", "warned"),
    [((None, None), False), ((10.0, None), True), ((10.0, 10.5), False), ((10.0, 30.0), True)],
)
def test_other_limits_of_length_are_pointed_out(pair, capsys, limits, warned):
    for folder, limit in zip(pair, limits, strict=True):
        file = folder / "layers.1" / "cfg.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config if limit is None else {**config, "max_norm": limit}))
    comparison = compare(*(inspect_path(folder) for folder in pair))
    assert ("exclude tokens above different norms" in " ".join(shown(comparison, capsys).split())) == warned


def shown(comparison, capsys):
    from rich.console import Console

    render_comparison(comparison, Console(width=140))
    return capsys.readouterr().out


def evaluation(fvu, recovered, kl):
    number = {"value": 0.5, "low": None, "high": None}
    return {
        "format": EVAL_FORMAT,
        "dataset": "text",
        "data": "held out",
        "tokens": 100,
        "together": None,
        "layers": [
            {
                "hookpoint": "layers.1",
                "reconstruction": {"fvu": {**number, "value": fvu}},
                "grafted": {"ce_recovered": {**number, "value": recovered}, "kl": {**number, "value": kl}},
            }
        ],
    }


def test_what_is_compared(pair, capsys):
    comparison = compare(*map(inspect_path, pair))
    (layer,) = comparison.layers
    assert layer.hookpoint == "layers.1"
    assert layer.of_first.share == 1
    assert 0.5 <= layer.of_second.share < 0.6
    text = shown(comparison, capsys)
    for part in ("0.2500", "0.1250", "100.0% (1.00)", "32 latents, k 4", "64 latents, k 8", "Run saekit eval on both"):
        assert part in text
    assert json.loads(json.dumps(comparison_to_json(comparison)))["layers"][0]["of_first"]["share"] == 1


def test_evaluations_are_compared_where_both_have_one(pair, capsys):
    (pair[0] / "eval.json").write_text(json.dumps(evaluation(0.3, 0.9, 0.2)), encoding="utf-8")
    assert "CE recovered" not in shown(compare(*map(inspect_path, pair)), capsys)
    (pair[1] / "eval.json").write_text(json.dumps(evaluation(0.2, 0.95, 0.1)), encoding="utf-8")
    text = shown(compare(*map(inspect_path, pair)), capsys)
    for part in ("CE recovered", "0.9000", "0.9500", "0.3000", "0.1000"):
        assert part in text


def test_other_widths_share_nothing(pair, tmp_path):
    Sae(8, 32, 4).save_to_disk(tmp_path / "narrow" / "layers.1")
    (layer,) = compare(inspect_path(pair[0]), inspect_path(tmp_path / "narrow")).layers
    assert layer.of_first is None


def test_nothing_in_common(pair):
    with pytest.raises(UserError, match="no layer in common"):
        compare(inspect_path(pair[0], 0), inspect_path(pair[1]))
