"""What SAELens is given, by the formulas with which it computes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from saekit.sae import Sae, save_as_saelens
from saekit.sae.selection.batchtopk import BatchTopK

D, M, K = 8, 32, 4


def make_sae(threshold):
    selection = "topk" if threshold is None else BatchTopK(K, M, threshold)
    sae = Sae(D, M, K, selection=selection, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return sae


def read(folder):
    return json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")


COMMON = {
    "d_in": D,
    "d_sae": M,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}


def test_topk(tmp_path):
    sae, x = make_sae(None), torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    save_as_saelens(sae, tmp_path / "new" / "folder", {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"})
    config, w = read(tmp_path / "new" / "folder")
    metadata = {"sae_lens_version": "6.0.0", "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}
    topk = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": False}
    assert config == {**COMMON, **topk, "metadata": metadata}
    assert {name: list(each.shape) for name, each in w.items()} == {
        "W_enc": [D, M],
        "b_enc": [M],
        "W_dec": [M, D],
        "b_dec": [D],
    }
    values, indices = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).topk(K, dim=-1)
    code = torch.zeros(20, M).scatter(-1, indices, values.relu())
    torch.testing.assert_close(code @ w["W_dec"] + w["b_dec"], sae(x).recon)


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_batchtopk_is_a_jumprelu(tmp_path, threshold):
    sae, x = make_sae(threshold), torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    save_as_saelens(sae, tmp_path)
    config, w = read(tmp_path)
    assert config == {**COMMON, "architecture": "jumprelu", "metadata": {"sae_lens_version": "6.0.0"}}
    assert torch.equal(w["threshold"], torch.full((M,), threshold))
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    code = pre.relu() * (pre > w["threshold"])
    kept = (code > 0).sum(1) <= 4 * K  # more than that it cannot say
    assert kept.any()
    assert threshold == 0 or kept.all()
    torch.testing.assert_close((code @ w["W_dec"] + w["b_dec"])[kept], sae(x).recon[kept])
