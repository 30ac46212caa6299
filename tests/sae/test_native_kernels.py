"""The native kernels against torch's operations and the formulas."""

import pytest
import torch

from saekit.sae.kernels import eager, native_ops, scores, torch_ops
from saekit.sae.kernels.sparse import Sparse
from tests.sae.native import needs_native

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "AMX": torch.bfloat16, "int8": torch.int8}
SIZES = [(1, 1, 1, 1), (7, 5, 33, 4), (3, 8, 64, 64), (5, 16, 1000, 24), (2, 4, 4099, 300), (0, 4, 10, 2)]

AMX_SIZES = [
    (1, 1, 1, 1),
    (31, 30, 513, 1),  # with the bias one whole tile deep; a slab and one latent
    (33, 31, 512, 7),
    (700, 64, 3000, 48),  # several blocks of tokens
    (5, 100, 2000, 900),
    (40, 8, 31, 31),
    (513, 16, 1056, 200),
]


def small_integers(*shape, seed=0, below=2):
    """Whose products and sums every precision holds exactly, so that many scores are equal."""
    return torch.randint(-below, below + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.fixture(params=TYPES)
def dtype(request, monkeypatch):
    """What scores are in. With AMX bfloat16 has a way of its own; the other is tested without."""
    if request.param == "AMX" and not native_ops.has_amx():
        pytest.skip("this CPU has no AMX")
    if request.param != "AMX":
        monkeypatch.setattr(native_ops, "has_amx", lambda: False)
    return TYPES[request.param]


@needs_native
class TestTopk:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("shift", [0, -100], ids=["some positive", "none positive"])
    def test_of_scores_that_are_exact(self, dtype, size, shift, monkeypatch):
        N, D, M, k = size
        if dtype == torch.int8:  # rounds to what is in the factors already, if each row has the same largest number
            monkeypatch.setattr(scores, "INT8", 4)
            monkeypatch.setattr(scores, "_mean_square", lambda rows: rows.new_ones(rows.shape[1]))
        x, W, b = small_integers(N, D), small_integers(M, D, seed=1), small_integers(M, seed=2) + shift
        x[:, 0] = W[:, 0] = 4
        values, latents = native_ops.topk(x, W, b, k, dtype)
        dense = x @ W.T + b
        expected = dense.topk(k).values
        assert all(len(set(row)) == k for row in latents.tolist())
        torch.testing.assert_close(dense.gather(1, latents), expected, rtol=0, atol=0)
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("parts", [1, 4, 12])
    def test_in_parts_and_in_any_order(self, dtype, parts):
        x, W, b = (
            torch.randn(*shape, generator=torch.Generator().manual_seed(3)) for shape in ((9, 8), (600, 8), (600,))
        )
        values, latents = native_ops.topk(x, W, b, 12, dtype, True, parts)
        whole = dtype == torch.bfloat16 and parts == 1 and native_ops.has_amx()  # its scores are not rounded
        if whole:
            x, W = x.bfloat16().float(), W.bfloat16().float()
        # Of equal scores it may have others.
        expected, _ = torch_ops.topk(x, W, b, 12, torch.float32 if whole else dtype, True, parts)
        near = 1e-4 if whole else 1e-6  # a bias is two numbers of 8 bits
        torch.testing.assert_close(values, expected.float(), rtol=near, atol=near)
        assert torch.equal(
            latents.view(9, parts, -1) // (600 // parts), torch.arange(parts)[:, None].expand(9, -1, 12 // parts)
        )
        any_values, any_latents = native_ops.topk(x, W, b, 12, dtype, False, parts)
        for got, ordered in ((any_values, values), (any_latents, latents)):
            assert torch.equal(got.view(9, parts, -1).sort().values, ordered.view(9, parts, -1).sort().values)

    def test_chunks_and_threads_change_nothing(self, dtype, monkeypatch):
        x, W, b = small_integers(50, 8, below=90), small_integers(700, 8, seed=1, below=90), small_integers(700, seed=2)
        whole = native_ops.topk(x, W, b, 20, dtype)
        monkeypatch.setattr(scores, "SHARED_FROM", 0)
        monkeypatch.setattr(scores, "ROWS", 1)
        threads = torch.get_num_threads()
        try:
            for count, rows in ((1, 1), (3, 7), (2, 49)):
                torch.set_num_threads(count)
                monkeypatch.setattr(scores, "CHUNK_BYTES", rows * 700 * 2)
                for got, expected in zip(native_ops.topk(x, W, b, 20, dtype), whole, strict=True):
                    assert torch.equal(got, expected)
        finally:
            torch.set_num_threads(threads)

    def test_more_than_there_are_is_refused(self, dtype):
        with pytest.raises(RuntimeError, match="out of range"):
            native_ops.topk(torch.ones(2, 4), torch.ones(6, 4), torch.ones(6), 7, dtype)


@pytest.fixture
def needs_amx():
    if not native_ops.has_amx():
        pytest.skip("this CPU has no AMX")


def assert_largest(x, W, b, k, values, latents):
    """Those of the products of bfloat16, in order; of scores that are equal but for rounding any."""
    scores = x.bfloat16().double() @ W.bfloat16().double().T + b.double()
    near = {"rtol": 1e-4, "atol": 1e-4 * float(scores[scores.isfinite()].abs().max())}
    torch.testing.assert_close(values.double(), scores.topk(k).values, **near)
    torch.testing.assert_close(scores.gather(1, latents), values.double(), **near)
    assert all(len(set(row)) == k for row in latents.tolist())


@needs_native
@pytest.mark.usefixtures("needs_amx")
class TestEncoderWithItsTopk:
    """On a CPU with AMX: scores are kept nowhere, and most are forgotten as they are made."""

    @pytest.mark.parametrize("size", AMX_SIZES)
    @pytest.mark.parametrize("order", ["random", "rising", "falling"])
    def test_is_the_encoder_and_its_topk(self, size, order):
        N, D, M, k = size
        generator = torch.Generator().manual_seed(N)
        x, W, b = (torch.randn(*shape, generator=generator) for shape in ((N, D), (M, D), (M,)))
        if order != "random":  # each latent better than all before, or worse
            W, b = W[:1].expand(M, D).contiguous(), torch.linspace(0, 100, M)
            b = b if order == "rising" else -b
        assert_largest(x, W, b, k, *native_ops.topk(x, W, b, k, torch.bfloat16))

    def test_of_equal_scores_the_first(self):
        x, W, b = torch.ones(70, 16), torch.ones(2000, 16), torch.zeros(2000)
        b[1500:1510] = 1
        _, latents = native_ops.topk(x, W, b, 24, torch.bfloat16)
        expected = torch.cat([torch.arange(1500, 1510), torch.arange(14)])
        assert torch.equal(latents, expected.expand(70, -1))

    @pytest.mark.parametrize("latent", [0, 511, 512, 1999])
    def test_what_is_not_finite(self, latent):
        generator = torch.Generator().manual_seed(0)
        x, W, b = (torch.randn(*shape, generator=generator) for shape in ((40, 16), (2000, 16), (2000,)))
        for number in (torch.nan, -torch.nan):
            W_nan = W.clone().index_fill_(0, torch.tensor([latent]), number)
            values, latents = native_ops.topk(x, W_nan, b, 8, torch.bfloat16)
            assert (latents[:, 0] == latent).all()
            assert values[:, 0].isnan().all()
            assert values[:, 1:].isfinite().all()
        x_nan = x.clone()
        x_nan[7, 3] = torch.nan
        values, latents = native_ops.topk(x_nan, W, b, 8, torch.bfloat16)
        assert values.isnan().any(1).nonzero().tolist() == [[7]]
        assert latents[7].tolist() == list(range(8))
        b_low = torch.full_like(b, -torch.inf)
        b_low[latent] = 0
        values, latents = native_ops.topk(x, W, b_low, 8, torch.bfloat16)
        assert (latents[:, 0] == latent).all()
        assert (values[:, 1:] == -torch.inf).all()
        assert all(len(set(row)) == 8 for row in latents.tolist())

    def test_threads_change_nothing(self):
        generator = torch.Generator().manual_seed(0)
        x, W, b = (torch.randn(*shape, generator=generator) for shape in ((300, 40), (1500, 40), (1500,)))
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(native_ops.topk(x, W, b, 20, torch.bfloat16))
        finally:
            torch.set_num_threads(threads)
        for other in found[1:]:
            assert all(map(torch.equal, other, found[0]))

    def test_memory_of_a_larger_dictionary_is_used_again(self):
        generator = torch.Generator().manual_seed(0)
        for M in (2000, 70, 1001):
            x, W, b = (torch.randn(*shape, generator=generator) for shape in ((9, 24), (M, 24), (M,)))
            assert_largest(x, W, b, 16, *native_ops.topk(x, W, b, 16, torch.bfloat16))

    def test_rows_of_another_width_are_refused(self):
        with pytest.raises(RuntimeError, match="size"):
            native_ops.topk(torch.ones(4, 64), torch.ones(2000, 32), torch.ones(2000), 8, torch.bfloat16)

    def test_torchs_own_tiles_are_as_they_were(self):
        x, W = torch.randn(100, 64).bfloat16(), torch.randn(64, 90).bfloat16()
        before = x @ W
        for _ in range(3):
            native_ops.topk(x.float(), W.float().T.contiguous(), torch.zeros(90), 4, torch.bfloat16)
            assert torch.equal(x @ W, before)


@needs_native
@pytest.mark.parametrize(("C", "k", "parts"), [(1, 1, 1), (48, 32, 1), (7, 7, 1), (24, 12, 4), (5, 5, 5), (300, 3, 3)])
def test_best_of_few(C, k, parts):
    generator = torch.Generator().manual_seed(C)
    latents = torch.stack([torch.randperm(5000, generator=generator)[:C] for _ in range(33)])
    scores = torch.randn(33, C, generator=generator)
    for got, expected in zip(
        native_ops.best_of(scores, latents, k, parts), torch_ops.best_of(scores, latents, k, parts), strict=True
    ):
        assert torch.equal(got, expected)
    scores[3, C // 2], scores[4] = torch.nan, 1.0
    scores[5] = -torch.inf
    values, found = native_ops.best_of(scores, latents, k, parts)
    assert values[3].isnan().sum() == 1
    first = torch.arange(C).view(parts, -1)[:, : k // parts].flatten()
    assert torch.equal(found[4:6], latents[4:6][:, first])
    assert native_ops.best_of(scores, latents.int(), k, parts)[1].dtype == torch.int32  # by torch


def random_code(N, M, D, K):
    generator = torch.Generator().manual_seed(N + M)
    rows, x = torch.randn(M, D, generator=generator), torch.randn(N, D, generator=generator)
    return rows, x, torch.randint(0, M, (N, K), generator=generator), torch.randn(N, K, generator=generator)


@needs_native
class TestSums:
    @pytest.mark.parametrize("size", [(7, 33, 5, 4), (1, 1, 1, 1), (40, 9, 100, 3), (0, 10, 4, 2), (3, 10, 4, 0)])
    def test_are_those_of_torch(self, size):
        rows, x, indices, weights = random_code(*size)
        torch.testing.assert_close(native_ops.gather_dot(x, rows, indices), torch_ops.gather_dot(x, rows, indices))
        torch.testing.assert_close(
            native_ops.gather_sum(weights, indices, rows), torch_ops.gather_sum(weights, indices, rows)
        )

    @pytest.mark.parametrize("size", [(7, 33, 5, 4), (64, 128, 17, 8), (0, 10, 4, 2), (1, 3, 9, 1)])
    @pytest.mark.parametrize("shift", [0.0, -3.0], ids=["some active", "few active"])
    def test_values_and_gradients(self, size, shift):
        N, M, D, k = size
        generator = torch.Generator().manual_seed(M)
        shapes = ((N, D), (M, D), (M,), (M, D), (D,))
        leaves = [torch.randn(*shape, generator=generator) for shape in shapes]
        leaves[2] += shift
        found = []
        for kernels in (Sparse("native", native_ops), eager):
            parameters = [each.clone().requires_grad_() for each in leaves]
            out, acts, _ = kernels.autoencode(*parameters, k)
            gradients = torch.autograd.grad((out.square().sum() + acts.sum()), parameters)
            found.append((out, acts, *gradients))
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    def test_threads_change_nothing(self):
        rows, x, indices, weights = random_code(100, 50, 33, 8)
        threads = torch.get_num_threads()
        found = []
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append((native_ops.gather_dot(x, rows, indices), native_ops.gather_sum(weights, indices, rows)))
        finally:
            torch.set_num_threads(threads)
        for one, three in zip(*found, strict=True):
            assert torch.equal(one, three)

    @pytest.mark.parametrize("index", [-1, 33, 2**40])
    def test_a_row_that_is_not_there(self, index):
        rows, x, indices, weights = random_code(7, 33, 5, 4)
        indices[3, 2] = index
        for call in (
            lambda: native_ops.gather_dot(x, rows, indices),
            lambda: native_ops.gather_sum(weights, indices, rows),
        ):
            with pytest.raises(IndexError, match="out of range for 33 rows"):
                call()

    @pytest.mark.parametrize("size", [(7, 33, 1, 4), (100, 5, 1, 3), (0, 10, 1, 2), (3, 10, 1, 0)])
    def test_pairs_in_order(self, size):
        _, _, indices, _ = random_code(*size)
        for got, expected in zip(
            native_ops.sort_pairs(indices, size[1]), torch_ops.sort_pairs(indices, size[1]), strict=True
        ):
            assert torch.equal(got, expected)
        with pytest.raises(IndexError, match="out of range for 10 rows"):
            native_ops.sort_pairs(torch.tensor([[3, 10]]), 10)

    def test_views_and_other_types(self):
        rows, x, indices, weights = random_code(6, 20, 8, 6)
        for change in (lambda each: each.t().contiguous().t(), torch.Tensor.double):
            torch.testing.assert_close(
                native_ops.gather_dot(change(x), change(rows), indices.t().contiguous().t()),
                torch_ops.gather_dot(change(x), change(rows), indices),
            )
            torch.testing.assert_close(
                native_ops.gather_sum(change(weights), indices, change(rows)),
                torch_ops.gather_sum(change(weights), indices, change(rows)),
            )
