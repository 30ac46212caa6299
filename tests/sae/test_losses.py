"""Every loss term and its gradients against the formulas, written out densely and differentiated by autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F

from saekit.sae import Sae, sae_losses
from saekit.sae.kernels import choose_kernels
from tests.sae.dense import away_from_the_start_, dense_topk, gradients, tokens

N, D, M, K = 40, 12, 48, 3
SCALE = 1 / (N * 7.5)
DEAD = torch.tensor([1, 5, 8, 13, 30, 31, 40])
IS_DEAD = torch.zeros(M, dtype=torch.bool).index_fill(0, DEAD, True)


def make_sae(multi_topk=False):
    sae = Sae(D, M, K, multi_topk=multi_topk, generator=torch.Generator().manual_seed(1)).double()
    return away_from_the_start_(sae, 0.3)


def make_x():
    return tokens(N, D)


def reference(sae, x, *, auxk_alpha, dead, multi_topk, k_aux=D // 2):
    """Gao et al. 2024: sections 2.3, 2.4 and 5.4, as one would write them on a blackboard."""
    scores = F.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    recon = dense_topk(scores, K) @ sae.W_dec + sae.b_dec
    terms = {"mse": (x - recon).square().sum() * SCALE}
    total = terms["mse"]
    if dead is not None:
        alive = torch.ones(M, dtype=torch.bool)
        alive[dead] = False
        k = min(k_aux, len(dead))
        predicted = dense_topk(scores.masked_fill(alive, 0.0), k) @ sae.W_dec
        residual = (x - recon).detach()
        terms["auxk"] = (residual - predicted).square().sum() * SCALE * min(1.0, len(dead) / k_aux)
        total = total + auxk_alpha * terms["auxk"]
    if multi_topk:
        wide = dense_topk(scores, 4 * K) @ sae.W_dec + sae.b_dec
        terms["multi_topk"] = (x - wide).square().sum() * SCALE
        total = total + terms["multi_topk"] / 8
    return total, terms


CASES = {
    "main": (0.0, None, False),
    "auxk": (1 / 32, DEAD, False),
    "auxk, heavy": (3.0, DEAD, False),
    "auxk, two dead": (1.0, DEAD[:2], False),
    "multi-topk": (0.0, None, True),
    "all": (0.5, DEAD, True),
}


@pytest.mark.parametrize("case", CASES)
def test_terms_and_gradients_equal_the_formulas(case):
    auxk_alpha, dead, multi_topk = CASES[case]
    sae, x = make_sae(multi_topk), make_x()
    num_dead = 0 if dead is None else len(dead)
    losses = sae_losses(x, sae(x, aux=dead), scale=SCALE, auxk_alpha=auxk_alpha, num_dead=num_dead)
    expected_total, expected = reference(sae, x, auxk_alpha=auxk_alpha, dead=dead, multi_topk=multi_topk)

    for name in ("mse", "auxk", "multi_topk"):
        term = getattr(losses, name)
        assert (term is None) == (name not in expected)
        if term is not None:
            torch.testing.assert_close(term, expected[name], rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.total, expected_total, rtol=1e-12, atol=0)

    found, wanted = gradients(sae, losses.total), gradients(sae, expected_total)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("term", "multi_topk"), [("auxk", False), ("multi_topk", True)])
def test_auxiliary_gradients_reach_the_encoder(term, multi_topk):
    sae, x = make_sae(multi_topk), make_x()
    losses = sae_losses(x, sae(x, aux=DEAD), scale=SCALE, auxk_alpha=1.0, num_dead=len(DEAD))
    dW_enc, db_enc = torch.autograd.grad(getattr(losses, term), [sae.W_enc, sae.b_enc])
    assert dW_enc.abs().sum() > 0
    assert db_enc.abs().sum() > 0
    if term == "auxk":
        touched = dW_enc.abs().sum(1).nonzero().squeeze(1)
        assert set(touched.tolist()) <= set(DEAD.tolist())


def test_auxk_does_not_add_the_decoder_bias_again():
    # Dead latents that all stay at zero predict zero, whatever b_dec is.
    sae, x = make_sae(), make_x()
    with torch.no_grad():
        sae.b_dec.fill_(100.0)
        sae.b_enc[DEAD] = -1e6
    out = sae(x, aux=DEAD)
    assert not out.aux_recon.any()


def test_auxk_residual_is_detached():
    sae, x = make_sae(), make_x()
    losses = sae_losses(x, sae(x, aux=DEAD), scale=SCALE, auxk_alpha=1.0, num_dead=len(DEAD))
    (dW_dec,) = torch.autograd.grad(losses.auxk, [sae.W_dec])
    alive = torch.ones(M, dtype=torch.bool)
    alive[DEAD] = False
    assert not dW_dec[alive].any()


def test_a_batch_in_pieces_gives_the_same_gradient():
    sae, x = make_sae(multi_topk=True), make_x()
    options = {
        "scale": SCALE,
        "auxk_alpha": 0.5,
        "num_dead": len(DEAD),
        "revive_alpha": 2.0,
        "revive_scale": 1 / N,
    }
    whole = sae_losses(x, sae(x, IS_DEAD, aux=DEAD), **options).total
    pieces = sum(
        sae_losses(part, sae(part, IS_DEAD, aux=DEAD), **options).total for part in (x[:1], x[1:17], x[17:17], x[17:])
    )
    found, wanted = gradients(sae, pieces), gradients(sae, whole)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-14)


def test_dead_biases_are_raised_and_nothing_else_is_touched():
    sae, x = make_sae(), make_x()
    out = sae(x, IS_DEAD)
    assert out.aux_recon is None
    options = {"scale": SCALE, "auxk_alpha": 0.0, "num_dead": len(DEAD)}
    plain = sae_losses(x, out, **options)
    raised = sae_losses(x, out, **options, revive_alpha=0.25, revive_scale=1 / (2 * N * 3.0))  # of a step of 2N tokens
    assert plain.revive is None
    torch.testing.assert_close(raised.revive, -sae.b_enc[DEAD].sum() / 6)
    torch.testing.assert_close(raised.total, plain.total - sae.b_enc[DEAD].sum() / 24)
    found, expected = gradients(sae, raised.total), gradients(sae, sae_losses(x, sae(x), **options).total)
    expected["b_enc"] = expected["b_enc"].index_add(0, DEAD, torch.full((len(DEAD),), -1 / 24, dtype=torch.float64))
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-14)


def test_raised_latents_fire_again():
    sae, x = make_sae(), make_x()
    with torch.no_grad():
        sae.b_enc[DEAD] = -15.0
    fired = {alpha: set() for alpha in (0.0, 1e-4)}
    for alpha, seen in fired.items():
        own = copy.deepcopy(sae)
        adam = torch.optim.Adam([{"params": [own.b_enc], "lr": 0.3}, {"params": [own.W_enc, own.W_dec]}], lr=1e-3)
        for _ in range(100):
            dead = torch.tensor([m in set(DEAD.tolist()) - seen for m in range(M)])
            out = own(x, dead)
            seen |= set(out.indices[out.fired].tolist()) & set(DEAD.tolist())
            losses = sae_losses(
                x, out, scale=SCALE, auxk_alpha=0.0, num_dead=int(dead.sum()), revive_alpha=alpha, revive_scale=1 / N
            )
            adam.zero_grad()
            losses.total.backward()
            adam.step()
    assert fired == {0.0: set(), 1e-4: set(DEAD.tolist())}


def test_no_dead_latents_means_no_auxk():
    sae, x = make_sae(), make_x()
    out = sae(x, torch.zeros(M, dtype=torch.bool), aux=torch.empty(0, dtype=torch.int64))
    assert out.aux_recon is None
    losses = sae_losses(x, out, scale=SCALE, auxk_alpha=1.0, num_dead=0, revive_alpha=1.0, revive_scale=1.0)
    assert losses.auxk is None
    assert losses.total == losses.mse


@pytest.mark.parametrize("kernels", ["eager", "cpu"])
def test_matryoshka(kernels):
    """Bussmann et al. 2025: each prefix of the dictionary is to reconstruct, with what it has of the k latents."""
    sae, x = make_sae(), make_x()
    sae.chosen_kernels = choose_kernels(kernels, "fp32", torch.device("cpu"))
    sae.prefixes = (6, 20, M)
    scores = dense_topk(F.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc), K)
    errors = [
        (x - scores[:, :prefix] @ sae.W_dec[:prefix] - sae.b_dec).square().sum() * SCALE for prefix in sae.prefixes
    ]
    losses = sae_losses(x, sae(x), scale=SCALE, auxk_alpha=0.0, num_dead=0)
    torch.testing.assert_close(losses.mse, errors[-1])
    torch.testing.assert_close(losses.nested, errors[0] + errors[1])
    torch.testing.assert_close(losses.total, sum(errors))
    for got, wanted in zip(gradients(sae, losses.total).values(), gradients(sae, sum(errors)).values(), strict=True):
        torch.testing.assert_close(got, wanted)
    assert sae.eval()(x).prefix_recons == ()
