"""What `saekit eval` shows: no number is cut off on 80 columns."""

import io
import re

import pytest
from rich.console import Console

from saekit.views.evaluation import render_evaluation


def estimate(value):
    return {"value": value, "low": value - 0.01, "high": value + 0.01}


def record(tokens):
    reconstruction = {
        "fvu": estimate(0.2683),
        "explained_variance": estimate(0.7354),
        "cosine": estimate(0.9058),
        "l0": estimate(8.0),
        "dead": 37,
        "num_latents": 256,
        "tokens": tokens,
    }
    layers = [{"hookpoint": f"layers.{layer}", "reconstruction": reconstruction, "grafted": None} for layer in (0, 11)]
    return {
        "model": "m",
        "dataset": "d",
        "data": "held out",
        "sequences": 4,
        "ctx_len": 32,
        "tokens": 100,
        "objective": "nothing",
        "ce_clean": None,
        "layers": layers,
        "together": None,
        "warnings": [],
    }


@pytest.mark.parametrize(("width", "with_intervals"), [(80, False), (100, True)])
def test_what_is_too_long_finds_room(width, with_intervals):
    shown = io.StringIO()
    render_evaluation(record(tokens=54), Console(file=shown, width=width))
    text = shown.getvalue()
    (row,) = [line for line in text.splitlines() if line.startswith("layers.11")]
    assert ("0.7354 ± 0.0100" in row) == with_intervals
    assert row.split()[:4] == ["layers.11", "0.2683", "±", "0.0100"]
    assert row.split()[-2:] == ["14.5%", "46.0%"]
    assert "Excluded: the share of tokens" in " ".join(text.split())
    assert re.search(r"dead +excluded", text)
    assert "…" not in text


def test_without_long_ones_there_is_no_column():
    shown = io.StringIO()
    render_evaluation(record(tokens=100), Console(file=shown, width=80))
    assert not re.search(r"Excluded|dead +excluded", shown.getvalue())
    assert "0.7354 ± 0.0100" in shown.getvalue()


@pytest.mark.parametrize(("width", "with_head"), [(80, True), (120, True), (80, False)])
def test_parts_of_crosscoders_and_skip_connections_have_rows_of_their_own(width, with_head):
    own, shown = record(tokens=54), io.StringIO()
    numbers = ("ce", "ce_mean_ablated", "ce_zero_ablated", "ce_recovered", "kl", "top1")
    grafted = {key: estimate(0.5) for key in numbers} if with_head else None
    transcoder, crosscoder = own["layers"]
    fidelity = {key: estimate(0.1234) for key in ("fvu", "explained_variance", "cosine")}
    skip = {**fidelity, "grafted": grafted and {**grafted, "ce_recovered": estimate(0.4321)}}
    transcoder |= {"hookpoint": "layers.0.mlp", "kind": "transcoder", "grafted": grafted, "skip": skip, "parts": []}
    parts = [{"hookpoint": f"layers.{layer}", **fidelity} for layer in (3, 4)]
    crosscoder |= {"hookpoint": "crosscoder", "kind": "crosscoder", "grafted": grafted, "skip": None, "parts": parts}
    own["together"] = grafted
    own["ce_clean"] = estimate(1.0)
    render_evaluation({**own, "scored": 3}, Console(file=shown, width=width))
    lines = shown.getvalue().splitlines()
    skips = [line for line in lines if line.startswith("  skip alone")]
    assert ["0.1234" in line for line in skips] == [True, False][: len(skips)]
    assert len(skips) == 1 + with_head
    assert not with_head or "0.4321" in skips[1]
    assert [line.split()[:2] for line in lines if line.startswith("  layers")] == [
        [f"layers.{layer}", "0.1234"] for layer in (3, 4)
    ]
    said = " ".join(" ".join(lines).split())
    assert "compare prediction and target" in said
    assert "the mean over its hookpoints, each scaled to one variance" in said
    assert ("0 is zero ablation" in said) == with_head
    assert "…" not in said
