"""The sparse kernels against the readable ones: values and gradients."""

import pytest
import torch

from saekit.sae import Sae
from saekit.sae.kernels import choose, choose_kernels, eager, torch_ops
from saekit.sae.kernels.sparse import Sparse

SIZES = [(7, 5, 33, 4), (64, 16, 128, 8), (1, 3, 9, 1), (5, 8, 6, 6), (0, 4, 10, 2)]
CPU = Sparse("cpu", torch_ops)
SELECTS_IN_BF16 = Sparse("cpu", torch_ops, torch.bfloat16)


def leaves(N, D, M, shift=0.0):
    generator = torch.Generator().manual_seed(N * 1000 + M)
    shapes = ((N, D), (M, D), (M,), (M, D), (D,))
    x, W_enc, b_enc, W_dec, centre = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [each.requires_grad_() for each in (x, W_enc, b_enc + shift, W_dec, centre)]


def two_calls(kernels, x, W_enc, b_enc, W_dec, centre, k):
    acts, indices = kernels.encode_topk(x, W_enc, b_enc, k, centre_D=centre)
    return kernels.decode(acts, indices, W_dec), acts, indices


def one_call(kernels, *arguments):
    return kernels.autoencode(*arguments)


def values_and_gradients(kernels, N, D, M, k, shift=0.0, call=one_call):
    parameters = leaves(N, D, M, shift)
    out, acts, indices = call(kernels, *parameters, k)
    generator = torch.Generator().manual_seed(k)
    out_grad, acts_grad = (torch.randn(*each.shape, generator=generator, dtype=each.dtype) for each in (out, acts))
    gradients = torch.autograd.grad([out, acts], parameters, [out_grad, acts_grad])
    return out, acts, indices, gradients


@pytest.mark.parametrize("call", [one_call, two_calls])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [0.0, -3.0, -100.0], ids=["some active", "few active", "none active"])
def test_sparse_equals_eager(size, shift, call):
    out, acts, indices, gradients = values_and_gradients(CPU, *size, shift, call)
    expected_out, expected_acts, expected_indices, expected_gradients = values_and_gradients(eager, *size, shift)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(acts, expected_acts)
    positive = expected_acts > 0  # which latents fill up with zeros is nobody's business
    assert torch.equal(indices[positive], expected_indices[positive])
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_scores_are_made_in_chunks_of_tokens(monkeypatch):
    whole = values_and_gradients(CPU, 64, 16, 128, 8)
    for rows in (1, 7, 63):  # 8 bytes per score
        monkeypatch.setattr(torch_ops, "CHUNK_BYTES", rows * 128 * 8)
        chunked = values_and_gradients(CPU, 64, 16, 128, 8)
        torch.testing.assert_close(chunked[:3], whole[:3])


def test_a_latent_that_was_chosen_at_zero_gets_no_gradient():
    # With a bias of -100 no latent is positive, and yet k of them are chosen: ReLU's mask must stop the gradient.
    _, acts, _, gradients = values_and_gradients(CPU, 64, 16, 128, 8, shift=-100.0)
    assert not acts.any()
    for gradient in gradients:
        assert not gradient.any()


def test_gradcheck():
    def autoencode(*parameters):
        out, acts, _ = CPU.autoencode(*parameters, 2)
        return out, acts

    assert torch.autograd.gradcheck(autoencode, leaves(4, 3, 7))


def test_no_gradient_machinery_without_gradients():
    x, W = torch.randn(3, 4), torch.randn(8, 4, requires_grad=True)
    with torch.no_grad():
        acts, indices = CPU.encode_topk(x, W, torch.zeros(8), 2)
        assert not CPU.decode(acts, indices, W).requires_grad


class TestSelectionInLowPrecision:
    N, D, M, K = 200, 64, 1000, 16

    def both(self):
        parameters = leaves(self.N, self.D, self.M)
        return parameters, SELECTS_IN_BF16.autoencode(*parameters, self.K), eager.autoencode(*parameters, self.K)

    def test_only_near_ties_change(self):
        (x, W_enc, b_enc, _, centre), (_, _, indices), (_, exact_acts, exact) = self.both()
        scores = (x - centre) @ W_enc.T + b_enc
        assert (indices.sort().values.diff() > 0).all()  # k different latents
        assert not torch.equal(indices.sort().values, exact.sort().values)  # else this test sees nothing
        # Inputs and scores are each rounded to 8 bits; a score is a sum of 64 products of size one.
        rounding = 2**-8 * scores.abs().amax(1, keepdim=True)
        chosen_worst = scores.gather(1, indices).amin(1, keepdim=True)
        assert (chosen_worst >= exact_acts[:, -1:] - 2 * rounding).all()

    def test_values_and_gradients_are_exact_for_what_was_chosen(self):
        parameters, (out, acts, indices), _ = self.both()
        x, W_enc, b_enc, W_dec, centre = parameters
        expected_acts = torch.relu((x - centre) @ W_enc.T + b_enc).gather(1, indices)
        expected = eager.decode(expected_acts, indices, W_dec)
        torch.testing.assert_close(acts, expected_acts)
        torch.testing.assert_close(out, expected)
        assert (acts.diff() <= 0).all()  # largest first, by the exact values
        gradients = torch.autograd.grad(out.square().sum(), parameters)
        for got, wanted in zip(gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))

    def test_scores_that_float32_orders_by_a_hair_are_ordered_exactly_among_the_chosen(self):
        W = torch.tensor([[1.0], [1.0 + 2**-12], [0.5]])  # the first two are one number in bfloat16
        acts, indices = SELECTS_IN_BF16.encode_topk(torch.ones(1, 1), W, torch.zeros(3), 2)
        assert indices.tolist() == [[1, 0]]
        assert acts.tolist() == [[1 + 2**-12, 1.0]]


class TestChoice:
    def test_by_name(self):
        cpu = torch.device("cpu")
        assert choose_kernels("auto", "fp32", cpu).name == "cpu"
        assert choose_kernels("auto", "bf16", cpu).select_dtype == torch.bfloat16
        assert choose_kernels("cpu", "fp32", cpu).select_dtype is None
        assert choose_kernels("eager", "auto", cpu).name == "eager"

    def test_eager_does_not_select_in_low_precision(self):
        with pytest.raises(ValueError, match="eager kernels select"):
            choose_kernels("eager", "bf16", torch.device("cpu"))

    def test_triton_that_is_missing(self, monkeypatch):
        monkeypatch.setattr(choose, "has_triton", lambda: False)
        with pytest.raises(ValueError, match="not installed"):
            choose_kernels("triton", "fp32", torch.device("cpu"))

    def test_an_sae_selects_exactly_unless_told_otherwise(self):
        sae = Sae(4, 16, 2)
        assert sae.kernels.select_dtype is None
        sae.chosen_kernels = SELECTS_IN_BF16
        assert sae.kernels is SELECTS_IN_BF16
