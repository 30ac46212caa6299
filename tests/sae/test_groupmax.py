"""GroupMax: the code against the formula, written out densely and differentiated by autograd."""

import json

import pytest
import torch
import torch.nn.functional as F

from saekit import SaeConfig
from saekit.sae import Sae, sae_losses, save_as_saelens
from saekit.sae.kernels import choose_kernels, eager, scores, sparse, torch_ops
from saekit.sae.kernels.sparse import Sparse, num_candidates
from tests.sae.dense import away_from_the_start_, dense, dense_topk, gradients, tokens

N, D, M, K = 40, 12, 60, 5
GROUP = M // K
SCALE = 1 / (N * 7.5)
LOW_PRECISION = [torch.bfloat16, torch.int8]


def make_sae(kernels="cpu", shift=0.0):
    sae = Sae(D, M, K, selection="groupmax", generator=torch.Generator().manual_seed(1)).double()
    sae.chosen_kernels = choose_kernels(kernels, "fp32", torch.device("cpu"))
    away_from_the_start_(sae, 0.5).b_enc.data.sub_(shift)
    return sae


def make_x(*lead):
    return tokens(*(lead or (N,)), D)


def dense_code(sae, x):
    """`[N, M]`: of each group the largest latent, zero elsewhere."""
    scores = F.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    kept = torch.zeros_like(scores)
    for start in range(0, M, GROUP):
        best = scores[:, start : start + GROUP].argmax(1)
        kept[torch.arange(len(x)), start + best] = 1.0
    return scores * kept


@pytest.mark.parametrize("kernels", ["eager", "cpu"])
@pytest.mark.parametrize("prefixes", [(), (6, 20, M)], ids=["", "matryoshka"])
@pytest.mark.parametrize("shift", [0.0, 4.0], ids=["", "empty groups"])
def test_code_loss_and_gradients_equal_the_formulas(kernels, prefixes, shift):
    sae, x = make_sae(kernels, shift), make_x()
    sae.prefixes = prefixes
    code = dense_code(sae, x)
    assert ((code > 0).sum(1) < K).any() == (shift > 0), "groups where nothing is positive"
    errors = [(x - code[:, :size] @ sae.W_dec[:size] - sae.b_dec).square().sum() * SCALE for size in prefixes or (M,)]
    out = sae(x)
    assert out.acts.shape == out.indices.shape == (N, K)
    assert torch.equal(out.indices // GROUP, torch.arange(K).expand(N, K)), "one of each group"
    torch.testing.assert_close(dense(out.acts, out.indices, M), code)
    losses = sae_losses(x, out, scale=SCALE, auxk_alpha=0.0, num_dead=0)
    torch.testing.assert_close(losses.total, sum(errors))
    found, wanted = gradients(sae, losses.total), gradients(sae, sum(errors))
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_it_is_not_topk():
    sae, x = make_sae(), make_x()
    topk = Sae(D, M, K).double()
    topk.load_state_dict(sae.state_dict())
    assert (topk(x).recon != sae(x).recon).any(1).all()


@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,)])
def test_encode_decode_and_forward_agree(lead):
    sae, x = make_sae().eval(), make_x(*lead)
    acts, indices = sae.encode(x)
    assert acts.shape == indices.shape == (*lead, K)
    torch.testing.assert_close(sae.decode(acts, indices), sae(x).recon)
    torch.testing.assert_close(dense(acts, indices, M), dense_code(sae, x.reshape(-1, D)).view(*lead, M))


def test_auxk_chooses_among_all_dead_latents():
    sae, x, dead = make_sae(), make_x(), torch.tensor([1, 5, 8, 13, 30, 31, 40])
    out = sae(x, aux=dead)
    scores = F.relu((x - sae.b_dec) @ sae.W_enc[dead].T + sae.b_enc[dead])
    torch.testing.assert_close(out.aux_recon, dense_topk(scores, D // 2) @ sae.W_dec[dead])


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_names_two_of_each_group_and_the_exact_scores_choose(dtype, monkeypatch):
    monkeypatch.setattr(sparse, "WORTH_FROM", 0)
    sae, x = make_sae(), make_x()
    arguments = (x, sae.W_enc, sae.b_enc, K)
    acts, indices = Sparse("cpu", torch_ops, dtype).encode_topk(*arguments, centre_D=sae.b_dec, parts=K)
    expected_acts, expected = eager.encode_topk(*arguments, centre_D=sae.b_dec, parts=K)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(acts, expected_acts)
    W = torch.tensor([[1.0], [1.0 + 2**-12], [1.0 + 2**-13], [1.0]])  # all one number in 8 or 16 bits
    acts, indices = Sparse("cpu", torch_ops, dtype).encode_topk(torch.ones(1, 1), W, torch.zeros(4), 2, parts=2)
    assert indices.tolist() == [[1, 2]]
    assert acts.tolist() == [[1 + 2**-12, 1 + 2**-13]]


def test_how_many_candidates():
    assert num_candidates(32, 4096, 32) == 64
    assert num_candidates(32, 32, 32) == 32, "a group of one has no other"
    assert num_candidates(32, 4096) == 48


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_scores_are_made_in_chunks_of_tokens(rows, monkeypatch):
    monkeypatch.setattr(scores, "SHARED_FROM", 0)
    monkeypatch.setattr(scores, "CHUNK_BYTES", rows * M * 8)
    sae, x = make_sae(), make_x()
    torch.testing.assert_close(dense(*sae.encode(x), M), dense_code(sae, x))


def test_parts_of_more_than_one_latent_each():
    scores = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
    values, indices = eager.topk_in_parts(scores, 6, 3)
    for part in range(3):
        within = scores[:, part * 8 : part * 8 + 8].topk(2)
        assert torch.equal(values[:, part * 2 : part * 2 + 2], within.values)
        assert torch.equal(indices[:, part * 2 : part * 2 + 2], within.indices + part * 8)
    x, eye, none = scores[:, :4], torch.randn(24, 4), torch.zeros(24)
    for ours, theirs in zip(
        torch_ops.topk(x, eye, none, 6, torch.float32, parts=3), eager.topk_in_parts(x @ eye.T, 6, 3), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_round_trip(tmp_path):
    sae, x = make_sae(), make_x()
    sae.save_to_disk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["activation"] == "groupmax"
    assert "threshold" not in config
    loaded = Sae.load_from_disk(tmp_path).double()
    assert loaded.activation == "groupmax"
    torch.testing.assert_close(loaded(x).recon, sae(x).recon)
    assert Sae(**loaded.sizes()).activation == "groupmax"
    assert "groupmax" in repr(loaded)
    # sparsify can have both, and looks at the second only while it trains.
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "multi_topk": True}))
    torch.testing.assert_close(Sae.load_from_disk(tmp_path).double()(x).recon, sae(x).recon)


def test_saelens_has_none(tmp_path):
    with pytest.raises(ValueError, match="no architecture for groupmax"):
        save_as_saelens(make_sae(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 7}, "60 latents are not a multiple of 7"),
        ({"multi_topk": True}, "groupmax has no code at 4k"),
    ],
)
def test_what_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        Sae(**{"d_in": D, "num_latents": M, "k": K, "selection": "groupmax", **options})


def test_the_configuration_says_it_first():
    assert SaeConfig(activation="groupmax", num_latents=60, k=5).sizes(12, 60)["selection"] == "groupmax"
    with pytest.raises(ValueError, match=r"--activation groupmax with --k 7: .* 60 latents are not a multiple of 7"):
        SaeConfig(activation="groupmax", num_latents=60, k=7)
    with pytest.raises(ValueError, match="under groupmax there is no code at 4k"):
        SaeConfig(activation="groupmax", multi_topk=True)
