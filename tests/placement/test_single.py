import pytest
import torch

from saekit import Sae, TrainConfig
from saekit.placement import Single
from saekit.training.optimizers import make_optimizer


def place(num_latents=32, **options):
    sae = Sae(8, num_latents, 4, generator=torch.Generator().manual_seed(0), **options)
    placement = Single(torch.device("cpu"))
    placement.place(["h.0"], lambda _: sae, lambda module: make_optimizer(TrainConfig(lr=0.01), module))
    return placement, sae


def backward(placement, sae):
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    placement.backward("h.0", (sae(x).recon - x).square().sum())


def test_apply_projects_steps_normalizes_and_clears():
    placement, sae = place()
    rows = sae.W_dec.detach().clone()
    backward(placement, sae)
    placement.apply(1.0)
    # Adam's first moment is a tenth of the gradient it was given: nothing of it lies along the rows as they were.
    moment = placement.whole("h.0")[1]["W_dec.exp_avg"]
    assert moment.abs().max() > 0
    torch.testing.assert_close((moment * rows).sum(1), torch.zeros(32), atol=1e-5, rtol=0)
    assert not torch.equal(sae.W_dec, rows)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_apply_leaves_a_free_decoder_free():
    placement, sae = place(normalize_decoder=False)
    rows = sae.W_dec.detach().clone()
    backward(placement, sae)
    gradient = sae.W_dec.grad.clone()
    placement.apply(1.0)
    torch.testing.assert_close(placement.whole("h.0")[1]["W_dec.exp_avg"], 0.1 * gradient)
    assert (sae.W_dec.norm(dim=1) - rows.norm(dim=1)).abs().max() > 1e-4


def test_route_hands_over_and_lets_go():
    placement, _ = place()
    acts = {"h.0": torch.ones(2, 8), "h.1": torch.ones(3, 8)}
    for name, x in placement.route(acts, last=True):
        assert name not in acts
        assert x.shape[1] == 8
    assert not acts


def test_what_is_not_finite_shows_in_gradients_that_are_try_to_defer():
    placement, sae = place(1000)
    for number in (1.0, torch.nan, torch.inf):
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
        placement.backward("h.0", (sae(x).recon - x).square().sum() * number)
        assert sae.W_enc.grad is None
        assert placement.collect()["h.0"].isfinite() == (number == 1.0)
        placement.skip()
    torch.testing.assert_close(placement.collect(), {"h.0": torch.zeros(())})


def test_what_overflows_only_in_gradients_that_are_try_to_defer_shows():
    placement, sae = place(1000)
    x = torch.full((20, 8), 1e37)
    placement.backward("h.0", (1e3 * sae(x).recon).sum())
    assert sae.W_enc.grad is None
    assert sae.b_enc.grad.isfinite().all()
    assert sae.b_dec.grad.isfinite().all()
    assert not placement.collect()["h.0"].isfinite()


def test_held_bytes_are_those_of_the_moment():
    placement, sae = place(1000)
    weights = sum(each.nbytes for each in sae.parameters())
    assert placement.held_bytes() == weights
    placement.backward("h.0", (sae(x := torch.randn(20, 8)).recon - x).square().sum())
    numbers, pairs = 4 * (1000 + 8) + 2 * 4 * 20 * 8, 20 * 4  # biases' gradients, tokens' rows
    assert placement.held_bytes() == weights + numbers + pairs * (2 * 4 + 8) + 8 * 1001
    placement.apply(1.0)
    assert placement.held_bytes() == pytest.approx(3 * weights, abs=16)


def test_rows_count_as_they_are_marked():
    placement, _ = place()
    mask = torch.tensor([True, False, True])
    assert torch.equal(placement.counted(mask), mask)
