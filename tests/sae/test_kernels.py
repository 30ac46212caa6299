"""The sparse kernels against the readable ones: values and gradients."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from saekit.sae import Sae
from saekit.sae.kernels import choose, choose_kernels, eager, native_build, native_ops, scores, sparse, torch_ops
from saekit.sae.kernels.sparse import Sparse
from tests.sae.native import needs_native

SIZES = [(7, 5, 33, 4), (64, 16, 128, 8), (1, 3, 9, 1), (5, 8, 6, 6), (0, 4, 10, 2)]
CPU = Sparse("cpu", torch_ops)
SELECTS_IN_BF16 = Sparse("cpu", torch_ops, torch.bfloat16)
SELECTS_IN_INT8 = Sparse("cpu", torch_ops, torch.int8)


def leaves(N, D, M, shift=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(N * 1000 + M)
    shapes = ((N, D), (M, D), (M,), (M, D), (D,))
    x, W_enc, b_enc, W_dec, centre = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [each.to(dtype).requires_grad_() for each in (x, W_enc, b_enc + shift, W_dec, centre)]


def two_calls(kernels, x, W_enc, b_enc, W_dec, centre, k):
    acts, indices = kernels.encode_topk(x, W_enc, b_enc, k, centre_D=centre)
    return kernels.decode(acts, indices, W_dec), acts, indices


def one_call(kernels, *arguments):
    return kernels.autoencode(*arguments)


def values_and_gradients(kernels, N, D, M, k, shift=0.0, call=one_call, dtype=torch.float64):
    parameters = leaves(N, D, M, shift, dtype)
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


def nested(kernels, N, D, M, k, prefixes, shift=0.0):
    parameters = leaves(N, D, M, shift)
    rows, acts, indices = kernels.autoencode_nested(*parameters, k, prefixes)
    generator = torch.Generator().manual_seed(k)
    rows_grad, acts_grad = (torch.randn(*each.shape, generator=generator, dtype=each.dtype) for each in (rows, acts))
    gradients = torch.autograd.grad([rows, acts], parameters, [rows_grad, acts_grad])
    return rows, acts, indices, gradients


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [0.0, -3.0, -100.0], ids=["some active", "few active", "none active"])
@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
def test_nested_sparse_equals_eager(size, shift, cut):
    M = size[2]
    prefixes = tuple(sorted({max(1, int(cut * M) - 1), max(1, int(cut * M)), M}))
    rows, acts, _, gradients = nested(CPU, *size, prefixes, shift)
    expected_rows, expected_acts, _, expected_gradients = nested(eager, *size, prefixes, shift)
    assert rows.shape == (len(prefixes), *size[:2])
    torch.testing.assert_close(rows, expected_rows)
    torch.testing.assert_close(acts, expected_acts)
    torch.testing.assert_close(rows[-1], CPU.autoencode(*leaves(*size[:3], shift), size[3])[0])
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_scores_are_made_in_chunks_of_tokens(monkeypatch):
    monkeypatch.setattr(sparse, "WORTH_FROM", 0)
    monkeypatch.setattr(scores, "ROWS", 1)
    for kernels in (
        CPU,
        SELECTS_IN_BF16,
        SELECTS_IN_INT8,
    ):  # 8 bytes per score in float64; int32 and float32
        whole = values_and_gradients(kernels, 64, 16, 128, 8)
        with monkeypatch.context() as patch:
            patch.setattr(scores, "SHARED_FROM", 0)
            for rows in (1, 7, 63):
                patch.setattr(scores, "CHUNK_BYTES", rows * 128 * 8)
                chunked = values_and_gradients(kernels, 64, 16, 128, 8)
                torch.testing.assert_close(chunked[:3], whole[:3])
            patch.setattr(scores, "SHARED_FROM", 8 * 32 // 2 * 20)  # longer chunks, so that top-k has enough to share
            for most in (1, 5 * 128 * 8):
                patch.setattr(scores, "MOST_CHUNK_BYTES", most)
                torch.testing.assert_close(values_and_gradients(kernels, 64, 16, 128, 8)[:3], whole[:3])


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


@pytest.mark.parametrize(
    "kernels",
    [
        SELECTS_IN_BF16,
        SELECTS_IN_INT8,
        pytest.param(Sparse("native", native_ops, torch.bfloat16), marks=needs_native),
        pytest.param(Sparse("native", native_ops, torch.int8), marks=needs_native),
    ],
    ids=["bf16", "int8", "native bf16", "native int8"],
)
class TestSelectionInLowPrecision:
    """In float64, or float32 where the kernels are for that alone."""

    N, D, M, K = 200, 64, 1000, 16

    def leaves(self, kernels, shift=0.0):
        return leaves(self.N, self.D, self.M, shift, torch.float32 if kernels.name == "native" else torch.float64)

    @pytest.fixture(autouse=True)
    def _at_any_size(self, monkeypatch):
        monkeypatch.setattr(sparse, "WORTH_FROM", 0)

    def assert_close(self, kernels, got, expected):
        near = {"rtol": 1e-4, "atol": 1e-3} if kernels.name == "native" else {"rtol": None, "atol": None}
        torch.testing.assert_close(got, expected, **near)

    def test_is_left_to_large_dictionaries(self, kernels, monkeypatch):
        asked = []
        topk = kernels.ops.topk
        recording = SimpleNamespace(**vars(kernels.ops))
        recording.topk = lambda *arguments: asked.append((arguments[3], arguments[4])) or topk(*arguments)
        monkeypatch.setattr(sparse, "WORTH_FROM", 32)
        for M in (24 * 32 - 1, 24 * 32):
            Sparse(kernels.name, recording, kernels.select_dtype).encode_topk(
                torch.ones(2, 4), torch.ones(M, 4), torch.ones(M), 16
            )
        assert asked == [(16, torch.float32), (24, kernels.select_dtype)]

    def both(self, kernels):
        parameters = self.leaves(kernels)
        return parameters, kernels.autoencode(*parameters, self.K), eager.autoencode(*parameters, self.K)

    def test_the_k_largest_are_among_the_candidates(self, kernels):
        _, (out, acts, indices), expected = self.both(kernels)
        self.assert_close(kernels, (out, acts), expected[:2])
        assert torch.equal(indices, expected[2])

    @pytest.mark.parametrize("shift", [-30.0, -40.0, -100.0], ids=["some active", "few active", "none active"])
    def test_all_that_is_positive_is_among_the_candidates(self, kernels, shift):
        parameters = self.leaves(kernels, shift)
        expected = eager.autoencode(*parameters, self.K)
        assert 0 <= (expected[1] > 0).double().mean() < 0.99
        self.assert_close(kernels, kernels.autoencode(*parameters, self.K)[:2], expected[:2])

    def test_biases_keep_what_low_precision_rounds_off(self, kernels):
        left = torch.linspace(0, 0.9, self.M)[torch.randperm(self.M, generator=torch.Generator().manual_seed(0))]
        x, W_enc = torch.tensor([[100.0, 0.0]]), torch.tensor([[1.0, 0.0]]).expand(self.M, 2)
        _, indices = kernels.encode_topk(x, W_enc, left - 100, self.K)
        assert torch.equal(indices[0], left.topk(self.K).indices)

    def test_an_infinite_bias_keeps_a_latent_out(self, kernels):
        x, W_enc, b_enc, *_ = self.leaves(kernels)
        b_enc = b_enc.detach().clone().index_fill_(0, torch.arange(0, self.M, 2), -torch.inf)
        acts, indices = kernels.encode_topk(x, W_enc, b_enc, self.K)
        expected = eager.encode_topk(x, W_enc, b_enc, self.K)
        self.assert_close(kernels, (acts, indices), expected)

    def test_what_is_not_a_number_is_chosen(self, kernels):
        # A step must find it, to refuse it.
        for latent, number, parts in product((0, 777), (float("nan"), -float("nan")), (1, 2)):
            x, W_enc, b_enc, *_ = self.leaves(kernels)
            W_enc = W_enc.detach().clone().index_fill_(0, torch.tensor([latent]), number)
            acts, _ = kernels.encode_topk(x, W_enc, b_enc, self.K, parts=parts)
            assert acts.isnan().any(1).all()
        x = x.detach().clone().index_fill_(0, torch.tensor([3]), number)
        acts, _ = kernels.encode_topk(x, *self.leaves(kernels)[1:3], self.K)
        assert acts.isnan().any(1).nonzero().tolist() == [[3]]

    def test_without_spare_candidates_only_near_ties_change(self, kernels, monkeypatch):
        monkeypatch.setattr(sparse, "num_candidates", lambda k, *_: k)
        (x, W_enc, b_enc, _, centre), (_, _, indices), (_, exact_acts, exact) = self.both(kernels)
        scores = (x - centre) @ W_enc.T + b_enc
        assert (indices.sort().values.diff() > 0).all()  # k different latents
        assert not torch.equal(indices.sort().values, exact.sort().values)  # else this test sees nothing
        # Inputs and scores are each rounded, to 8 bits of their own or of the row's largest number; a score is a sum
        # of 64 products of size one.
        rounding = 2**-8 * scores.abs().amax(1, keepdim=True)
        chosen_worst = scores.gather(1, indices).amin(1, keepdim=True)
        assert (chosen_worst >= exact_acts[:, -1:] - 2 * rounding).all()

    def test_large_dimensions_leave_bits_to_the_small_ones(self, kernels):
        x, W_enc, b_enc, *_ = self.leaves(kernels)
        x = x.detach() * torch.ones(self.D).index_fill_(0, torch.tensor([3, 20, 41]), 30.0)
        x[:, 7] = 0  # and one that is nothing at all
        _, indices = kernels.encode_topk(x, W_enc, b_enc, self.K)
        _, exact = eager.encode_topk(x, W_enc, b_enc, self.K)
        assert (indices == exact).double().mean() > 0.998

    def test_tokens_and_latents_of_any_size(self, kernels):
        x, W_enc, b_enc, *_ = self.leaves(kernels)
        x = (x * torch.logspace(-4, 4, self.N)[:, None]).detach()
        W_enc = (W_enc * torch.logspace(-1, 1, self.M)[:, None]).detach()
        x[5], W_enc[5] = 0, 0
        _, indices = kernels.encode_topk(x, W_enc, b_enc, self.K)
        _, exact = eager.encode_topk(x, W_enc, b_enc, self.K)
        assert (indices == exact).double().mean() > 0.998

    @pytest.mark.parametrize("size", SIZES)
    def test_odd_sizes(self, kernels, size):
        for got, wanted in zip(
            values_and_gradients(kernels, *size)[:2], values_and_gradients(eager, *size)[:2], strict=True
        ):
            torch.testing.assert_close(got, wanted)

    def test_values_and_gradients_are_exact_for_what_was_chosen(self, kernels, monkeypatch):
        monkeypatch.setattr(sparse, "num_candidates", lambda k, *_: k)
        parameters, (out, acts, indices), _ = self.both(kernels)
        x, W_enc, b_enc, W_dec, centre = parameters
        expected_acts = torch.relu((x - centre) @ W_enc.T + b_enc).gather(1, indices)
        expected = eager.decode(expected_acts, indices, W_dec)
        self.assert_close(kernels, (out, acts), (expected, expected_acts))
        assert (acts.diff() <= 0).all()  # largest first, by the exact values
        gradients = torch.autograd.grad(out.square().sum(), parameters)
        near = 1e-5 if kernels.name == "native" else 1e-10
        for got, wanted in zip(gradients, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
            torch.testing.assert_close(got, wanted, rtol=near, atol=near * float(wanted.abs().max()))

    def test_scores_that_float32_orders_by_a_hair_are_ordered_exactly_among_the_chosen(self, kernels):
        W = torch.tensor([[1.0], [1.0 + 2**-12], [0.5]])  # the first two are one number in 8 or 16 bits
        acts, indices = kernels.encode_topk(torch.ones(1, 1), W, torch.zeros(3), 2)
        assert indices.tolist() == [[1, 0]]
        assert acts.tolist() == [[1 + 2**-12, 1.0]]


class TestChoice:
    def test_by_name(self):
        cpu = torch.device("cpu")
        assert choose_kernels("auto", "fp32", cpu).name == ("cpu" if native_build.why_not() else "native")
        assert choose_kernels("auto", "bf16", cpu).select_dtype == torch.bfloat16
        assert choose_kernels("cpu", "fp32", cpu).select_dtype is None
        assert choose_kernels("eager", "auto", cpu).name == "eager"

    @pytest.mark.parametrize(
        ("amx", "avx512_bf16", "amd", "vnni", "expected"),
        [
            (True, True, False, True, torch.bfloat16),
            (False, True, True, True, torch.bfloat16),
            (False, True, False, True, torch.int8),  # Intel's AVX-512 without AMX: bfloat16 is slower than float32
            (False, False, False, True, torch.int8),
            (False, False, True, False, None),
        ],
    )
    def test_auto_is_what_the_cpu_is_fast_at(self, monkeypatch, amx, avx512_bf16, amd, vnni, expected):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512_bf16)
        monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: vnni)
        monkeypatch.setattr(choose, "_made_by_amd", lambda: amd)
        assert choose_kernels("cpu", "auto", torch.device("cpu")).select_dtype == expected

    def test_8_bits_are_for_cpus(self):
        with pytest.raises(ValueError, match="only CPUs can select in int8"):
            choose_kernels("triton", "int8", torch.device("cpu"))

    @pytest.mark.parametrize("dtype", ["bf16", "int8"])
    def test_eager_does_not_select_in_low_precision(self, dtype):
        with pytest.raises(ValueError, match="eager kernels cannot select"):
            choose_kernels("eager", dtype, torch.device("cpu"))

    def test_triton_that_is_missing(self, monkeypatch):
        monkeypatch.setattr(choose, "has_triton", lambda: False)
        with pytest.raises(ValueError, match="not installed"):
            choose_kernels("triton", "fp32", torch.device("cpu"))

    def test_an_sae_selects_exactly_unless_told_otherwise(self):
        sae = Sae(4, 16, 2)
        assert sae.kernels.select_dtype is None
        sae.chosen_kernels = SELECTS_IN_BF16
        assert sae.kernels is SELECTS_IN_BF16
