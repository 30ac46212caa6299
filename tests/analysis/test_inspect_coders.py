"""Transcoders and crosscoders from their files: `saekit inspect` of one and of two of them."""

import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from saekit import Sae, UserError
from saekit.analysis.compare import compare
from saekit.analysis.inspect import inspect_path, inspection_to_json
from saekit.analysis.sharing import scales_of, sharing
from saekit.views.comparison import render_comparison
from saekit.views.inspection import render_inspection

MLP = {"reads": {"layers.1.mlp:in": 4}, "writes": {"layers.1.mlp": 6}}
RESID = {"layers.0": 2, "layers.1": 2, "layers.2": 2}
# Of five latents: one for all hookpoints, one for two, one for the first, one for the last, and one without a row.
DECODER = torch.tensor(
    [[3.0, 4, 0, 5, 5, 0], [0, 4, 4, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 8], [0, 0, 0, 0, 0, 0]]
)

KINDS = {
    "SAE": ("layers.1.mlp", lambda: Sae(6, 8, 2)),
    "transcoder": ("layers.1.mlp", lambda: Sae(4, 8, 2, transcode=True, d_out=6, max_norm_out=7.0, **MLP)),
    "sparsify's": ("layers.1.mlp", lambda: Sae(6, 8, 2, transcode=True)),
    "skip transcoder": (
        "layers.1.mlp",
        lambda: Sae(4, 8, 2, transcode=True, d_out=6, skip_connection=True, **MLP),
    ),
    "crosscoder": ("crosscoder", lambda: Sae(6, 5, 2, reads=RESID, writes=RESID)),
}


def written(folder, kind):
    name, make = KINDS[kind]
    sae = make()
    with torch.no_grad():
        if kind == "crosscoder":
            sae.W_dec.copy_(DECODER)
        if sae.W_skip is not None:
            sae.W_skip.fill_(0.5)
    sae.save_to_disk(folder / name)
    return folder / name


def shown(inspection, width=100):
    stream = io.StringIO()
    render_inspection(inspection, Console(file=stream, width=width, force_terminal=False))
    return stream.getvalue()


def flat(text):
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_shown_as_what_they_are(tmp_path, kind):
    inspection = inspect_path(written(tmp_path, kind).parent)
    (layer,) = inspection.layers
    assert layer.kind == {"sparsify's": "transcoder", "skip transcoder": "transcoder"}.get(kind, kind)
    assert (layer.d_in, layer.d_out) == ((4, 6) if kind in ("transcoder", "skip transcoder") else (6, 6))
    reads = {"SAE": ["layers.1.mlp"], "crosscoder": list(RESID)}.get(kind, ["layers.1.mlp:in"])
    assert list(layer.reads) == reads
    assert list(layer.writes) == (list(RESID) if kind == "crosscoder" else ["layers.1.mlp"])
    assert (layer.skip_norm is None) == (kind != "skip transcoder")
    assert (layer.sharing is None) == (kind != "crosscoder")
    text = shown(inspection)
    assert f"{layer.kind}s" in text
    assert "…" not in text
    if kind != "SAE":
        assert all(name in text for name in (*layer.reads, *layer.writes))
    if layer.skip_norm is not None:
        assert layer.skip_norm == pytest.approx((4 * 6 * 0.25) ** 0.5)
        assert "‖W_skip‖" in text
        assert "with a skip connection" in text
    assert ("max_norm_out" in text) == (kind == "transcoder")
    assert json.loads(json.dumps(inspection_to_json(inspection)))["layers"][0]["kind"] == layer.kind


def test_which_latents_hookpoints_share_by_hand():
    found = sharing(DECODER, RESID, torch.tensor([1.0, 1, 2, 2, 0.5, 0.5]))
    # Norms: 5, 10, 2.5; then 4, 8, 0.5; then 1, 0, 0; then 0, 0, 4.
    assert [(part.hookpoint, part.width, part.scale) for part in found.parts] == [
        ("layers.0", 2, 1.0),
        ("layers.1", 2, 2.0),
        ("layers.2", 2, 0.5),
    ]
    assert [part.median for part in found.parts] == [1, 0, 0.5]
    assert [part.own for part in found.parts] == [1, 0, 1]
    assert found.latents == (2, 2, 0)
    assert found.by_variance
    assert sharing(DECODER, RESID, torch.ones(6)).latents == (2, 1, 1)


def test_without_the_training_s_scales_norms_are_relative():
    rms = [(42 / 5) ** 0.5, (41 / 5) ** 0.5, (90 / 5) ** 0.5]
    assert scales_of(DECODER, [2, 2, 2], None) == pytest.approx([1 / each for each in rms])
    assert not sharing(DECODER, RESID, None).by_variance


def test_a_crosscoder_s_scales_are_those_of_its_training(tmp_path):
    folder = written(tmp_path, "crosscoder")
    (alone,) = inspect_path(folder).layers
    assert "relative to each hookpoint's rms" in flat(shown(inspect_path(folder)))
    scale_D = torch.tensor([1.0, 1, 100, 100, 0.5, 0.5])
    save_file({"frame.scale": scale_D}, folder / "state.safetensors")
    inspection = inspect_path(folder)
    (layer,) = inspection.layers
    assert [part.scale for part in layer.sharing.parts] == [1, 100, 0.5]
    text = shown(inspection)
    assert "all hookpoints scaled to one variance" in flat(text)
    rows = {
        line.split("│")[1].split()[0]: line.split("│")[1].split()[1:]
        for line in text.splitlines()
        if "layers.2" in line
    }
    assert rows["layers.2"] == ["0.500", "1", "(20.0%)"]
    # Rows 0 and 1 lie apart in training, one behind the other in the second hookpoint only.
    assert layer.neighbours != alone.neighbours


@pytest.mark.parametrize(
    ("tensor", "value", "says"),
    [
        ("W_dec", torch.zeros(8, 5), "is damaged: encoder, decoder and b_dec have the shapes"),
        (
            "W_skip",
            torch.zeros(5, 4),
            r"does not match cfg.json: .* has a skip connection \[5, 4\], but cfg.json says 6 from 4",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, tensor, value, says):
    file = written(tmp_path, "skip transcoder") / "sae.safetensors"
    save_file({**load_file(file), tensor: value}, file)
    with pytest.raises(UserError, match=says):
        inspect_path(file.parent)


@pytest.mark.parametrize(
    ("first", "second", "compared"),
    [
        ("transcoder", "skip transcoder", True),
        ("SAE", "transcoder", True),
        ("sparsify's", "SAE", True),
        ("crosscoder", "crosscoder", True),
    ],
)
def test_two_of_them(tmp_path, first, second, compared):
    pair = [written(tmp_path / str(n), kind).parent for n, kind in enumerate((first, second))]
    comparison = compare(*map(inspect_path, pair))
    (layer,) = comparison.layers
    assert (layer.of_first is not None) == compared
    if first == second:
        assert layer.of_first.share == 0.8  # a row of zeros is like nothing
    stream = io.StringIO()
    render_comparison(comparison, Console(file=stream, width=200))
    text = " ".join(stream.getvalue().split())
    for kind in {first, second} - {"SAE", "sparsify's"}:
        assert f"{kind}s ·" in text
    assert ("read different hookpoints" in text) == ("SAE" in (first, second))
