"""BatchTopK: the code against the formula, written out densely and differentiated by autograd."""

import math

import pytest
import torch
import torch.nn.functional as F

from saekit.sae import Sae, sae_losses
from saekit.sae.kernels import choose_kernels
from saekit.sae.selection.batchtopk import BatchTopK
from tests.sae.dense import away_from_the_start_, dense, dense_topk, gradients, tokens

N, D, M, K = 40, 12, 64, 3
THRESHOLD = 5.0
SCALE = 1 / (N * 7.5)


def make_sae(kernels="cpu", threshold=THRESHOLD):
    sae = Sae(D, M, K, selection=BatchTopK(K, M, threshold), generator=torch.Generator().manual_seed(1)).double()
    sae.chosen_kernels = choose_kernels(kernels, "fp32", torch.device("cpu"))
    return away_from_the_start_(sae, 0.5)


def make_x():
    return tokens(N, D)


def dense_code(sae, x):
    """`[N, M]`: of each token's 4k largest latents those above the threshold, zero elsewhere."""
    scores = F.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    return dense_topk(scores, 4 * K) * (scores > sae.selection.threshold)


def test_the_example_has_tokens_of_all_kinds():
    sae, x = make_sae(), make_x()
    above = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc > THRESHOLD).sum(1)
    assert int(above.min()) < K < int(above.max())
    assert int(above.max()) > 4 * K, "one has more than it can keep"


@pytest.mark.parametrize("kernels", ["eager", "cpu"])
@pytest.mark.parametrize("prefixes", [(), (6, 20, M)], ids=["", "matryoshka"])
def test_code_loss_and_gradients_equal_the_formulas(kernels, prefixes):
    sae, x = make_sae(kernels), make_x()
    sae.prefixes = prefixes
    code = dense_code(sae, x)
    errors = [(x - code[:, :size] @ sae.W_dec[:size] - sae.b_dec).square().sum() * SCALE for size in prefixes or (M,)]
    out = sae(x)
    assert out.acts.shape == out.indices.shape == (N, 4 * K)
    torch.testing.assert_close(dense(out.acts, out.indices, M), code)
    losses = sae_losses(x, out, scale=SCALE, auxk_alpha=0.0, num_dead=0)
    torch.testing.assert_close(losses.mse, errors[-1])
    torch.testing.assert_close(losses.total, sum(errors))
    found, wanted = gradients(sae, losses.total), gradients(sae, sum(errors))
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def test_auxk_is_the_same_as_without_a_threshold():
    """Dead latents compete among themselves; what they are to predict is what this code leaves."""
    sae, x, dead = make_sae(), make_x(), torch.tensor([1, 5, 8, 13, 30, 31, 40])
    out = sae(x, aux=dead)
    scores = F.relu((x - sae.b_dec) @ sae.W_enc[dead].T + sae.b_enc[dead])
    torch.testing.assert_close(out.aux_recon, dense_topk(scores, D // 2) @ sae.W_dec[dead])


@pytest.mark.parametrize("kernels", ["eager", "cpu"])
def test_a_batch_in_pieces_gives_the_same_gradient(kernels):
    sae, x = make_sae(kernels), make_x()
    options = {"scale": SCALE, "auxk_alpha": 0.0, "num_dead": 0}
    whole = sae_losses(x, sae(x), **options).total
    pieces = sum(sae_losses(part, sae(part), **options).total for part in (x[:1], x[1:17], x[17:17], x[17:]))
    found, wanted = gradients(sae, pieces), gradients(sae, whole)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
def test_encode_decode_and_forward_agree(lead):
    sae = make_sae().eval()
    x = 3 * torch.randn(*lead, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    acts, indices = sae.encode(x)
    assert acts.shape == indices.shape == (*lead, 4 * K)
    assert ((acts == 0) | (acts > THRESHOLD)).all()
    torch.testing.assert_close(sae.decode(acts, indices), sae(x).recon)
    torch.testing.assert_close(dense(acts, indices, M), dense_code(sae, x.reshape(-1, D)).view(*lead, M))


def test_what_lies_on_the_threshold_is_not_above_it():
    sae = make_sae(threshold=0.0)
    sae.selection.threshold.copy_(sae.encode(make_x()).acts[0, 1].detach())
    assert int((sae.encode(make_x()).acts[0] > 0).sum()) == 1


def test_nan_is_not_taken_for_a_small_value():
    sae, x = make_sae(), make_x()
    with torch.no_grad():
        sae.b_enc[3] = math.nan
    assert sae(x).recon.isnan().all()


def test_a_token_has_no_more_latents_than_there_are():
    sae = Sae(8, 10, 4, selection="batchtopk")
    assert sae.max_active == 10
    assert sae(torch.randn(3, 8)).acts.shape == (3, 10)
    assert Sae(8, 10, 4).max_active == 4


def test_the_threshold_goes_with_the_sizes():
    sae = make_sae()
    other = Sae(**sae.sizes())
    assert float(other.selection.threshold) == THRESHOLD
    assert "batchtopk, threshold=5" in repr(sae)
    other.selection.threshold.fill_(1.0)
    assert float(sae.selection.threshold) == THRESHOLD, "it is a copy"
    assert "threshold" not in repr(Sae(8, 32, 4))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"selection": "batchtopk", "multi_topk": True}, "multi_topk needs the selection topk"),
        ({"max_norm": -1.0}, "max_norm must be at least 0"),
        ({"max_norm": math.nan}, "max_norm must be at least 0"),
    ],
)
def test_what_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        Sae(8, 32, 4, **options)


@pytest.mark.parametrize("threshold", [-1.0, math.nan])
def test_no_threshold(threshold):
    with pytest.raises(ValueError, match="at least 0"):
        BatchTopK(4, 32, threshold)


def test_a_threshold_of_float64_is_compared_as_a_plain_number_would_be():
    """In the values' type: a float32 value that rounds a hair above the threshold is not above it."""
    threshold = 0.1
    values = torch.tensor([[0.1, 0.3]])
    assert float(values[0, 0]) > threshold
    sae = Sae(8, 32, 4, selection=BatchTopK(4, 32, threshold))
    assert (values > sae.selection.threshold).tolist() == (values > threshold).tolist() == [[False, True]]
