from __future__ import annotations

import io
import json
import os
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from saekit.analysis.inspect import inspect_path, inspection_to_json
from saekit.analysis.measure import density, neighbours
from saekit.errors import UserError
from saekit.runs.layout import FORMAT
from saekit.views.inspection import render_inspection

HOOKPOINTS = ["layers.10", "layers.2"]
TOKENS = 1_000_000

# Five decoder rows in the plane: 0 and 1 point the same way, 2 stands at right angles, 3 between, 4 against 0.
DECODER = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-3.0, 0.0]])
FIRE_COUNT = torch.tensor([0, 1, 100, 10_000, 1_000_000])
SILENT = torch.tensor([TOKENS, 500_000, 499_999, 10, 0])


def write_sae(folder, extras=True):
    folder.mkdir(parents=True)
    config = {"activation": "topk", "expansion_factor": 32, "num_latents": 5, "k": 3, "d_in": 2}
    (folder / "cfg.json").write_text(json.dumps(config))
    weights = {"encoder.weight": 2 * DECODER, "encoder.bias": torch.zeros(5), "W_dec": DECODER}
    save_file({**weights, "b_dec": torch.tensor([3.0, 4.0])}, folder / "sae.safetensors")
    if extras:
        about = {"hookpoint": folder.name, "step": 200, "tokens": TOKENS, "model": "gpt2", "dataset": "wikitext"}
        about |= {"dead_feature_threshold": 500_000, "fvu": 0.25}
        (folder / "saekit.json").write_text(json.dumps(about))
        state = {"tokens_since_fired": SILENT, "fire_count": FIRE_COUNT, "mean": torch.zeros(2)}
        save_file({**state, "variance": torch.tensor(1.0)}, folder / "state.safetensors")


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "step_00000200"
    for hookpoint in HOOKPOINTS:
        write_sae(checkpoint / hookpoint)
    (run / "step_00000100").mkdir()
    (run / "config.yaml").write_text("model: gpt2\n")
    os.symlink("step_00000200", run / "latest")
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    index = {"format": FORMAT, "step": 200, "tokens": TOKENS, "schedule": {"total_steps": 400}}
    index |= {"model": "gpt2", "dataset": "wikitext"}
    index |= {"hookpoints": HOOKPOINTS, "ctx_len": 64, "dead_feature_threshold": 500_000, "saekit_version": "0.1.0"}
    index |= {"files": {file.relative_to(checkpoint).as_posix(): {"bytes": file.stat().st_size} for file in files}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(index))
    lines = [{"step": s, "layers": {"layers.2": {"fvu": fvu}}} for s, fvu in [(100, 0.5), (200, 0.25), (300, 0.2)]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def sparsify(tmp_path):
    folder = tmp_path / "sparsify"
    for hookpoint in HOOKPOINTS:
        write_sae(folder / hookpoint, extras=False)
    write_sae(folder / "best" / "layers.2" / "layers.2", extras=False)
    (folder / "state.pt").write_bytes(b"not read")
    return folder


def shown(inspection, width=100, encoding="utf-8"):
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding, write_through=True)
    render_inspection(inspection, Console(file=stream, width=width, force_terminal=False))
    return buffer.getvalue().decode(encoding)


def test_numbers_by_hand(run):
    inspection = inspect_path(run)
    assert (inspection.kind, inspection.model, inspection.dataset) == ("run", "gpt2", "wikitext")
    assert (inspection.step, inspection.total_steps, inspection.tokens, inspection.ctx_len) == (200, 400, TOKENS, 64)
    first, second = inspection.layers
    assert (first.hookpoint, second.hookpoint) == ("layers.2", "layers.10")  # 2 before 10
    assert (first.d_in, first.num_latents, first.k, first.activation) == (2, 5, 3, "topk")
    assert first.fvu == 0.25
    assert first.trend == ((100, 0.5), (200, 0.25))  # the report after the checkpoint is not its own
    assert second.trend == ()
    assert first.dead == 2  # silent for 500 000 tokens and more
    assert first.never_fired == 1

    fires = first.density
    assert (fires.p5, fires.p25, fires.p50, fires.p75) == pytest.approx((2e-7, 1e-6, 1e-4, 1e-2))
    assert fires.p95 == pytest.approx(0.01 + 0.8 * 0.99)
    assert {i: n for i, n in enumerate(fires.histogram) if n} == {0: 1, 8: 1, 16: 1, 23: 1}

    # Nearest cosines: 1, 1, 0.8, 0.8, and 0 for the row that points against all others.
    near = first.neighbours
    assert (near.median, near.p99, near.max) == pytest.approx((0.8, 1.0, 1.0))
    assert (near.duplicates, near.rows) == (1, 5)

    sizes = first.norms
    assert (sizes.decoder_min, sizes.decoder_median, sizes.decoder_max) == pytest.approx((1, 1, 3))
    assert (sizes.encoder_median, sizes.b_dec) == pytest.approx((2, 5))


def test_every_way_to_name_the_same_layer(run):
    layer = inspect_path(run, 2).layers[0]
    checkpoint = run / "step_00000200"
    for path, chosen in [
        (run, "2"),
        (run, "layers.2"),
        (run / "latest", 2),
        (checkpoint, 2),
        (checkpoint / "layers.2", None),
        (checkpoint / "layers.2", 2),
        (str(run / "latest" / "layers.2"), None),
    ]:
        inspection = inspect_path(path, chosen)
        assert len(inspection.layers) == 1
        found = inspection.layers[0]
        assert (found.hookpoint, found.trend, found.dead) == (layer.hookpoint, layer.trend, layer.dead)
        assert inspection.model == "gpt2"
    assert inspect_path(checkpoint / "layers.2").kind == "sae"


def test_newest_step_where_the_link_was_lost(run):
    (run / "latest").unlink()
    (run / "step_00000100").rmdir()
    (run / "step_00000200.partial").mkdir()
    assert inspect_path(run).step == 200


def test_a_relative_path(run, monkeypatch):
    monkeypatch.chdir(run / "latest")
    assert inspect_path(".", 2).layers[0].trend == ((100, 0.5), (200, 0.25))


def test_sparsify(sparsify):
    inspection = inspect_path(sparsify)
    assert [layer.hookpoint for layer in inspection.layers] == ["layers.2", "layers.10"]
    assert (inspection.model, inspection.step, inspection.tokens) == (None, None, None)
    layer = inspection.layers[0]
    assert (layer.fvu, layer.dead, layer.never_fired, layer.density, layer.trend) == (None, None, None, None, ())
    assert layer.neighbours.duplicates == 1
    text = shown(inspection)
    assert "trained     –" in text
    assert text.count("layers.") == 2
    (sparsify / "config.json").write_text(json.dumps({"model": "gpt2", "dataset": "pile", "lr": 1}))
    assert inspect_path(sparsify / "layers.2").dataset == "pile"


def test_sparsify_seeds_are_not_layers(tmp_path):
    for seed in (1, 2):
        write_sae(tmp_path / "layers.7" / f"seed{seed}", extras=False)
    assert [one.hookpoint for one in inspect_path(tmp_path, 7).layers] == ["layers.7/seed1", "layers.7/seed2"]


def test_status_names_each_layer(run):
    said = []
    inspect_path(run, status=said.append)
    assert said == ["reading layers.2 (1 of 2)", "reading layers.10 (2 of 2)"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: (c / "layers.2" / "sae.safetensors").unlink(), r"layers\.2/sae\.safetensors is missing"),
        (lambda c: cut(c / "layers.2" / "state.safetensors"), r"layers\.2/state\.safetensors has .* bytes, but"),
        (lambda c: (c / "layers.2" / "cfg.json").unlink(), r"layers\.2/cfg\.json is missing"),
        (lambda c: (c / "checkpoint.json").write_text("{"), r"checkpoint\.json is damaged: it is not JSON"),
        (lambda c: (c / "checkpoint.json").write_text("[]"), r"checkpoint\.json is damaged: it is not a JSON object"),
        (
            lambda c: (c / "checkpoint.json").write_text('{"format": 99}'),
            f"has format 99, and this version of saekit reads only format {FORMAT}",
        ),
        (lambda c: (c.parent / "metrics.jsonl").write_text("x\n{}\n"), r"metrics\.jsonl, line 1"),
    ],
)
def test_a_spoilt_file_is_named(run, spoil, message):
    spoil(run / "step_00000200")
    with pytest.raises(UserError, match=message) as caught:
        inspect_path(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: cut(c / "sae.safetensors"), r"sae\.safetensors is truncated or damaged"),
        (lambda c: (c / "sae.safetensors").write_bytes(b"version https://git-lfs"), r"sae\.safetensors is truncated"),
        (lambda c: (c / "cfg.json").unlink(), r"cfg\.json cannot be read: No such file"),
        (lambda c: (c / "cfg.json").write_text('{"num_latents": 6}'), r"sae\.safetensors does not match cfg\.json"),
        (lambda c: save_file({"b_dec": torch.zeros(2)}, c / "sae.safetensors"), r"has no tensor W_dec"),
    ],
)
def test_a_spoilt_file_is_named_without_a_list_of_files(sparsify, spoil, message):
    spoil(sparsify / "layers.2")
    with pytest.raises(UserError, match=message):
        inspect_path(sparsify)
    assert inspect_path(sparsify, 10).layers[0].hookpoint == "layers.10"


def test_another_layer_can_be_seen_all_the_same(run):
    (run / "step_00000200" / "layers.2" / "sae.safetensors").unlink()
    assert inspect_path(run, 10).layers[0].hookpoint == "layers.10"


def test_counters_that_do_not_fit(sparsify):
    save_file({"fire_count": torch.zeros(4, dtype=torch.int64)}, sparsify / "layers.2" / "state.safetensors")
    with pytest.raises(UserError, match=r"fire_count is \[4\], not \[5\]"):
        inspect_path(sparsify)


def test_what_is_not_there(run, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        inspect_path(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a folder"):
        inspect_path(run / "config.yaml")
    with pytest.raises(UserError, match=r"there is no such layer; choose one of layers\.2, layers\.10"):
        inspect_path(run, 3)
    with pytest.raises(UserError, match=r"is not a checkpoint, but contains one: give \S*step_00000200$"):
        inspect_path(tmp_path)
    (tmp_path / "new" / "sub").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no folder has a sae\.safetensors"):
        inspect_path(tmp_path / "new")
    (tmp_path / "new" / "config.yaml").touch()
    with pytest.raises(UserError, match="has not saved a checkpoint yet"):
        inspect_path(tmp_path / "new")


def test_json_round_trip(run, sparsify):
    for path in (run, sparsify):
        data = inspection_to_json(inspect_path(path))
        assert json.loads(json.dumps(data, allow_nan=False)) == data
    data = inspection_to_json(inspect_path(run, 2))
    assert data["layers"][0]["density"]["p50"] == pytest.approx(1e-4)
    assert data["layers"][0]["trend"] == [[100, 0.5], [200, 0.25]]
    edges = data["density_histogram_log10_edges"]
    assert (len(edges), edges[0], edges[-1]) == (25, -6, 0)


def test_nan_weights_are_shown_and_null_in_json(sparsify):
    decoder = DECODER.clone()
    decoder[1, 0] = torch.nan
    weights = {"encoder.weight": DECODER, "W_dec": decoder, "b_dec": torch.zeros(2)}
    save_file(weights, sparsify / "layers.2" / "sae.safetensors")
    inspection = inspect_path(sparsify, 2)
    assert "nan" in shown(inspection)
    assert (
        json.loads(json.dumps(inspection_to_json(inspection), allow_nan=False))["layers"][0]["norms"]["decoder_max"]
        is None
    )


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("behind", ["", ".mlp.experts.down_proj:in"], ids=["short names", "long names"])
def test_view_fits(run, layer, width, behind):
    inspection = inspect_path(run, layer)
    layers = [replace(one, hookpoint=one.hookpoint + behind) for one in inspection.layers]
    text = shown(replace(inspection, layers=layers), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "step 200 of 400 · 1.00M tokens" in text
    assert "0.2500" in text
    assert "40.0%" in text  # dead
    assert "█▁" in text  # the trend
    assert "…" not in text


def test_view_in_ascii(run):
    assert shown(inspect_path(run, 2), encoding="ascii").isascii()


def test_the_dictionary_in_pieces_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    decoder = torch.randn(50, 6)
    decoder[40] = 3 * decoder[3]
    decoder[7] = 0
    unit = torch.nn.functional.normalize(decoder, dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    nearest = cosine.amax(dim=1)
    for rows in (1, 7, 50, 64):
        monkeypatch.setattr("saekit.analysis.measure.rows_at_a_time", lambda _, rows=rows: rows)
        for budget in (10**9, 50 * 50 * 6 // 2 - 1, 50 * 6 * 10):
            near = neighbours(decoder, budget)
            sample = torch.linspace(0, 49, near.rows).long()
            assert near.median == pytest.approx(nearest[sample].quantile(0.5).item(), abs=1e-6)
            assert near.max == pytest.approx(min(1, nearest[sample].max().item()), abs=1e-6)
            if near.rows == 50:
                assert near.duplicates == int((cosine > 0.95).sum()) // 2
        assert near.rows == 10
    assert neighbours(torch.ones(1, 4)) is None


def test_density_of_latents_that_never_fired():
    fires = density(torch.zeros(8, dtype=torch.int64), tokens=10)
    assert (fires.p95, sum(fires.histogram)) == (0, 0)
