import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from saekit import Sae
from saekit.sae.selection.batchtopk import BatchTopK
from saekit.sae.storage import find_sae_folders, folder_name, hookpoint_name, layer_number


@pytest.fixture
def sae():
    made = Sae(8, 32, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.b_enc.normal_()
        made.b_dec.normal_()
    return made


def test_files_are_named_and_shaped_as_sparsify_does(sae, tmp_path):
    sae.save_to_disk(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "encoder.weight": [32, 8],
        "encoder.bias": [32],
        "W_dec": [32, 8],
        "b_dec": [8],
    }
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config == {
        "activation": "topk",
        "expansion_factor": 4,
        "normalize_decoder": True,
        "num_latents": 32,
        "k": 4,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": 8,
    }


def test_round_trip(sae, tmp_path):
    sae.save_to_disk(tmp_path)
    loaded = Sae.load_from_disk(tmp_path)
    for name, parameter in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter)
    x = torch.randn(5, 8)
    assert torch.equal(loaded(x).recon, sae(x).recon)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_threshold_is_kept_exactly(sae, tmp_path):
    sae = Sae(**{**sae.sizes(), "selection": BatchTopK(4, 32, 0.1 + 0.2)})
    sae.save_to_disk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["activation"], config["threshold"], config["k"]) == ("batchtopk", 0.1 + 0.2, 4)
    loaded = Sae.load_from_disk(tmp_path)
    assert float(loaded.selection.threshold) == 0.1 + 0.2
    x = torch.randn(5, 8)
    assert torch.equal(loaded(x).recon, sae(x).recon)


def test_how_long_activations_may_be_is_kept_exactly(sae, tmp_path):
    sae.save_to_disk(tmp_path / "any")
    assert "max_norm" not in json.loads((tmp_path / "any" / "cfg.json").read_text())
    sae.max_norm = 0.1 + 0.2
    sae.save_to_disk(tmp_path)
    assert Sae.load_from_disk(tmp_path).max_norm == 0.1 + 0.2
    damage_config(tmp_path, max_norm="long")
    with pytest.raises(ValueError, match="no number 'max_norm' of at least 0"):
        Sae.load_from_disk(tmp_path)


@pytest.mark.parametrize("threshold", [None, -1, "0.1", True, float("nan"), float("inf")])
def test_batchtopk_without_a_threshold_is_damaged(sae, tmp_path, threshold):
    sae.save_to_disk(tmp_path)
    damage_config(tmp_path, activation="batchtopk", threshold=threshold)
    with pytest.raises(ValueError, match="BatchTopK needs a number 'threshold'"):
        Sae.load_from_disk(tmp_path)


def test_reads_what_sparsify_writes(sae, tmp_path):
    # Its defaults: num_latents 0 means d_in × expansion_factor, and newer versions may add fields.
    config = {"activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": 4}
    config |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": 8, "something_new": 1}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / "sae.safetensors")
    x = torch.randn(5, 8)
    assert torch.equal(Sae.load_from_disk(tmp_path)(x).recon, sae(x).recon)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_of_sparsify_compute_what_they_do_there(tmp_path, activation, skip):
    """By its formula, in folders as a run with several seeds has them; benchmarks/interop.py asks the package."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (32, 8), "encoder.bias": (32,), "W_dec": (32, 8), "b_dec": (8,), "W_skip": (8, 8)}
    w = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items() if skip or name != "W_skip"}
    config = {"activation": activation, "expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": 4}
    config |= {"multi_topk": False, "skip_connection": skip, "transcode": True, "d_in": 8}
    folder = tmp_path / "layers.3.mlp" / "seed1"
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(w, folder / "sae.safetensors")
    x = torch.randn(20, 8, generator=generator)
    scores = torch.relu(x @ w["encoder.weight"].T + w["encoder.bias"])  # b_dec is not subtracted
    acts, indices = scores.topk(4) if activation == "topk" else scores.view(20, 4, 8).max(dim=2)
    indices = indices if activation == "topk" else indices + torch.arange(0, 32, 8)
    expected = torch.zeros(20, 32).scatter(1, indices, acts) @ w["W_dec"] + w["b_dec"]
    expected += x @ w["W_skip"].T if skip else 0
    ((name, loaded),) = Sae.load_many(tmp_path).items()
    assert name == "layers.3.mlp/seed1"
    torch.testing.assert_close(loaded(x).recon, expected, rtol=0, atol=1e-5)
    loaded.save_to_disk(tmp_path / "again")
    assert {**config, "num_latents": 32} == json.loads((tmp_path / "again" / "cfg.json").read_text())
    again = load_file(tmp_path / "again" / "sae.safetensors")
    assert again.keys() == w.keys()
    assert all(torch.equal(again[name], w[name]) for name in w)


def test_load_many_sorts_naturally_and_follows_latest(sae, tmp_path):
    for layer in (10, 2, 1):
        sae.save_to_disk(tmp_path / "step_00000001" / f"layers.{layer}")
    assert list(Sae.load_many(tmp_path / "step_00000001")) == ["layers.1", "layers.2", "layers.10"]
    (tmp_path / "latest").symlink_to("step_00000001")
    assert list(Sae.load_many(tmp_path)) == ["layers.1", "layers.2", "layers.10"]


def test_load_from_hub_asks_for_one_hookpoint(sae, tmp_path, monkeypatch):
    sae.save_to_disk(tmp_path / "layers.3")
    asked = {}

    def snapshot_download(repo_id, allow_patterns, **kwargs):
        asked.update(repo_id=repo_id, allow_patterns=allow_patterns, **kwargs)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = Sae.load_from_hub("someone/saes", hookpoint="layers.3", revision="v2")
    assert torch.equal(loaded.W_enc, sae.W_enc)
    assert asked == {"repo_id": "someone/saes", "allow_patterns": "layers.3/*", "revision": "v2"}


def damage_truncated(folder):
    weights = folder / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def damage_config(folder, **changes):
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda f: (f / "sae.safetensors").unlink(), FileNotFoundError, "sae.safetensors is missing"),
        (lambda f: (f / "cfg.json").unlink(), FileNotFoundError, "cfg.json is missing"),
        (lambda f: (f / "cfg.json").write_text("{"), ValueError, "not valid JSON"),
        (damage_truncated, ValueError, "sae.safetensors is damaged or cut short"),
        (lambda f: damage_config(f, num_latents=33), ValueError, r"has shape \[32, 8\], but cfg.json says \[33, 8\]"),
        (lambda f: damage_config(f, k=None), ValueError, "no whole number 'k'"),
        (lambda f: damage_config(f, activation="relu"), ValueError, "'relu' is none of topk, batchtopk, groupmax"),
        (lambda f: damage_config(f, skip_connection=True), ValueError, "an autoencoder with a skip connection"),
    ],
)
def test_damaged_folders_are_named(sae, tmp_path, damage, error, says):
    sae.save_to_disk(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=says):
        Sae.load_from_disk(tmp_path)


def test_a_folder_without_saes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no SAE in"):
        Sae.load_many(tmp_path)


@pytest.mark.parametrize(
    ("hookpoint", "number"),
    [
        ("layers.3", 3),
        ("transformer.h.12", 12),
        ("7", 7),
        ("layers.3.mlp", 3),
        ("layers.3.experts.5", 3),
        ("layers.3.mlp:in", 3),
        ("layers.3/seed1", 3),
        ("embed_tokens", None),
        ("block2.mlp", None),
        ("layers.²", None),
    ],
)
def test_a_layers_number_is_the_first_in_its_path(hookpoint, number):
    assert layer_number(hookpoint) == number


@pytest.mark.parametrize("name", ["layers.3", "h.3.mlp:in", "embed_tokens", "layers.3.in", "h.1:in"])
def test_folders_have_names_that_every_system_allows_and_that_are_read_back(name, sae, tmp_path):
    folder = folder_name(name)
    assert not set(folder) & set('<>:"/\\|?*')
    assert hookpoint_name(folder) == name
    assert hookpoint_name(f"{folder}/seed1") == f"{name}/seed1"
    sae.save_to_disk(tmp_path / folder)
    assert find_sae_folders(tmp_path) == {name: tmp_path / folder}
