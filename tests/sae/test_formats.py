"""Files of several formats: recognized, read and written through `saekit.load` and `saekit.save`."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import saekit
from saekit import Sae, UserError
from saekit.registry import FORMATS
from saekit.sae.formats.base import format_of
from saekit.sae.selection.batchtopk import BatchTopK
from tests.plugins import loaded

D, M, K = 8, 32, 4
TWO = {"layers.1": 3, "layers.2": 5}

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
(ONE_FILE,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "FORMATS" in text]
"""The example of docs/extending.md, a format called npz."""


@pytest.fixture
def sae():
    made = Sae(D, M, K, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.b_enc.normal_(generator=torch.Generator().manual_seed(1))
        made.b_dec.normal_(generator=torch.Generator().manual_seed(2))
    return made


@pytest.fixture
def npz(tmp_path):
    file = tmp_path / "npz_format.py"
    file.write_text(ONE_FILE, encoding="utf-8")
    with loaded(file):
        yield


def assert_same(one, other):
    x = 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one.encode(x).indices, other.encode(x).indices)
    assert torch.equal(one(x).recon, other(x).recon)
    assert (one.max_norm, one.normalize_decoder) == (other.max_norm, other.normalize_decoder)


@pytest.mark.parametrize("name", ["sparsify", "saelens"])
@pytest.mark.parametrize("changes", [{}, {"max_norm": 0.1 + 0.2, "normalize_decoder": False}], ids=["plain", "more"])
def test_what_is_written_is_recognized_and_read(sae, tmp_path, name, changes):
    made = Sae(**{**sae.sizes(), **changes})
    made.load_state_dict(sae.state_dict())
    if changes:
        made.W_dec.data *= 1.5
    saekit.save(made, tmp_path / "new" / "layers.3", name)
    assert format_of(tmp_path / "new" / "layers.3").name == name
    for path, hookpoint in (("new/layers.3", None), ("new", "layers.3"), ("new", None)):
        assert_same(saekit.load(tmp_path / path, hookpoint), made)
    assert list(saekit.load_many(tmp_path / "new")) == ["layers.3"]


def test_a_plug_in_is_one_file(sae, tmp_path, npz):
    saekit.save(sae, tmp_path / "saes" / "layers.2", format="npz")
    assert [file.name for file in (tmp_path / "saes" / "layers.2").iterdir()] == ["sae.npz"]
    assert_same(saekit.load(tmp_path / "saes" / "layers.2"), sae)
    saekit.save(sae, tmp_path / "saes" / "layers.10")
    assert list(saekit.load_many(tmp_path / "saes")) == ["layers.2", "layers.10"], "each in the format that it is in"
    assert list(saekit.load_many(tmp_path / "saes", format="npz")) == ["layers.2"]
    with pytest.raises(UserError, match="the format npz has topk"):
        saekit.save(Sae(D, M, K, selection="groupmax"), tmp_path / "other", "npz")
    assert not (tmp_path / "other").exists()


def test_without_the_plug_in_there_is_no_such_format(sae, tmp_path):
    with pytest.raises(UserError, match="there is no format 'npz': choose one of sparsify, saelens"):
        saekit.save(sae, tmp_path, "npz")


def test_a_folder_in_two_formats_needs_a_choice(sae, tmp_path, npz):
    folder = tmp_path / "both"
    saekit.save(sae, folder, "npz")
    saekit.save(Sae(D, M, K + 1), folder)
    with pytest.raises(UserError, match=r"both can be read as sparsify and as npz: choose one with format="):
        saekit.load(folder)
    assert [saekit.load(folder, format=name).k for name in ("sparsify", "npz")] == [K + 1, K]


def test_a_folder_in_no_format_says_what_was_looked_for(tmp_path):
    (tmp_path / "cfg.json").write_text('{"hidden_size": 8}')
    said = (
        r"neither it nor a folder below it contains sae\.safetensors \(sparsify\), sae_weights\.safetensors \(saelens\)"
    )
    with pytest.raises(UserError, match=said):
        saekit.load(tmp_path)
    with pytest.raises(UserError, match=r"contains sae_weights\.safetensors \(saelens\)$"):
        saekit.load(tmp_path, format="saelens")


@pytest.mark.parametrize("name", ["sparsify", "saelens"])
def test_a_folder_without_its_weights_is_recognized_by_its_configuration(sae, tmp_path, name):
    saekit.save(sae, tmp_path, name)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.unlink()
    with pytest.raises(UserError, match=f"{weights.name} is missing"):
        saekit.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "metadata", "says"),
    [
        ("sparsify", {}, {"model_name": "gpt2"}, r"cannot store metadata \(model_name\)"),
        ("saelens", {"selection": "groupmax"}, None, "no architecture for groupmax"),
        ("saelens", {"transcode": True}, None, "SAELens' transcoders cannot select latents"),
        ("saelens", {"reads": TWO, "writes": TWO}, None, "no crosscoders, but this one reads 2 hookpoints"),
    ],
)
def test_what_a_format_cannot_say_is_refused_before_anything_is_written(tmp_path, name, kind, metadata, says):
    with pytest.raises(UserError, match=says):
        saekit.save(Sae(D, M, K, **kind), tmp_path / "new", name, metadata)
    assert not (tmp_path / "new").exists()


def test_a_format_may_be_for_writing_or_reading_only(sae, tmp_path, monkeypatch):
    saekit.save(sae, tmp_path)
    monkeypatch.delattr(FORMATS.get("sparsify"), "read")
    monkeypatch.delattr(FORMATS.get("sparsify"), "write")
    with pytest.raises(UserError, match="can write the format sparsify, but cannot read it"):
        saekit.load(tmp_path)
    with pytest.raises(UserError, match="can read the format sparsify, but cannot write it"):
        saekit.save(sae, tmp_path)


def change_config(folder, **changes):
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))


def cut_tensor(folder):
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, "W_enc": tensors["W_enc"].T.contiguous()}, folder / "sae_weights.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "cfg.json").unlink(), "cfg.json is missing or is not a JSON object"),
        (lambda f: (f / "cfg.json").write_text("[1]"), "cfg.json is missing or is not a JSON object"),
        (lambda f: change_config(f, architecture="gated"), "architecture is 'gated', but saekit can read only 'topk'"),
        (
            lambda f: change_config(f, apply_b_dec_to_input=False),
            "apply_b_dec_to_input is False, but saekit can read only True",
        ),
        (lambda f: change_config(f, rescale_acts_by_decoder_norm=True), "rescale_acts_by_decoder_norm is True"),
        (lambda f: change_config(f, normalize_activations="layer_norm"), "normalize_activations is 'layer_norm'"),
        (lambda f: change_config(f, d_sae="32"), "no whole number 'd_sae'"),
        (lambda f: change_config(f, k=M + 1), "larger than num_latents"),
        (lambda f: change_config(f, metadata={"saekit_max_norm": -1}), "no number 'saekit_max_norm' of at least 0"),
        (cut_tensor, r"W_enc has shape \[32, 8\], but cfg.json says \[8, 32\]"),
    ],
)
def test_what_saelens_computes_otherwise_is_refused(sae, tmp_path, damage, says):
    saekit.save(sae, tmp_path, "saelens")
    damage(tmp_path)
    with pytest.raises(UserError, match=says):
        saekit.load(tmp_path)


def test_a_jumprelu_is_written_and_not_read(tmp_path):
    made = Sae(D, M, K, selection=BatchTopK(K, M, 0.5))
    saekit.save(made, tmp_path, "saelens")
    with pytest.raises(UserError, match="architecture is 'jumprelu', but saekit can read only 'topk'"):
        saekit.load(tmp_path)


def test_folders_of_saelens_are_found_from_the_hub_too(sae, tmp_path, monkeypatch):
    saekit.save(sae, tmp_path / "hub" / "blocks.3", "saelens")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **options: str(tmp_path / "hub"))
    assert_same(saekit.load("owner/saes", "blocks.3"), sae)
    assert_same(saekit.load("owner/saes"), sae)
    shutil.copytree(tmp_path / "hub" / "blocks.3", tmp_path / "hub" / "blocks.4")
    with pytest.raises(UserError, match=r"has several SAEs: choose one of blocks\.3, blocks\.4"):
        saekit.load("owner/saes")
