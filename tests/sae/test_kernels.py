"""The sparse kernels against the readable ones: values and gradients."""

import pytest
import torch

from saekit.sae.kernels import eager, sparse

SIZES = [(7, 5, 33, 4), (64, 16, 128, 8), (1, 3, 9, 1), (5, 8, 6, 6), (0, 4, 10, 2)]


def values_and_gradients(kernels, N, D, M, k, shift=0.0):
    generator = torch.Generator().manual_seed(N * 1000 + M)
    x, W_enc, b_enc, W_dec, out_grad = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((N, D), (M, D), (M,), (M, D), (N, D))
    )
    leaves = [x, W_enc, b_enc + shift, W_dec]
    for leaf in leaves:
        leaf.requires_grad_()
    acts, indices = kernels.encode_topk(leaves[0], leaves[1], leaves[2], k)
    out = kernels.decode(acts, indices, leaves[3])
    gradients = torch.autograd.grad(out, leaves, out_grad)
    return out, acts, indices, gradients


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [0.0, -3.0, -100.0], ids=["some active", "few active", "none active"])
def test_sparse_equals_eager(size, shift):
    out, acts, indices, gradients = values_and_gradients(sparse, *size, shift)
    expected_out, expected_acts, expected_indices, expected_gradients = values_and_gradients(eager, *size, shift)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(acts, expected_acts)
    positive = expected_acts > 0  # which latents fill up with zeros is nobody's business
    assert torch.equal(indices[positive], expected_indices[positive])
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_a_latent_that_was_chosen_at_zero_gets_no_gradient():
    # With a bias of -100 no latent is positive, and yet k of them are chosen: ReLU's mask must stop the gradient.
    _, acts, _, (dx, dW_enc, db_enc, dW_dec) = values_and_gradients(sparse, 64, 16, 128, 8, shift=-100.0)
    assert not acts.any()
    for gradient in (dx, dW_enc, db_enc, dW_dec):
        assert not gradient.any()


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    x, W_enc, b_enc, W_dec = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((4, 3), (7, 3), (7,), (7, 3))
    )

    def autoencode(x, W_enc, b_enc, W_dec):
        acts, indices = sparse.encode_topk(x, W_enc, b_enc, 2)
        return sparse.decode(acts, indices, W_dec)

    assert torch.autograd.gradcheck(autoencode, (x, W_enc, b_enc, W_dec))


def test_no_gradient_machinery_without_gradients():
    x, W = torch.randn(3, 4), torch.randn(8, 4, requires_grad=True)
    with torch.no_grad():
        acts, indices = sparse.encode_topk(x, W, torch.zeros(8), 2)
        assert not sparse.decode(acts, indices, W).requires_grad
