"""The Triton kernels against the formulas: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from saekit import Sae
from saekit.sae.kernels import choose_kernels, eager
from saekit.sae.kernels.eager import row_norms
from saekit.sae.kernels.row_sums import RowSums
from saekit.sae.kernels.sparse import Sparse
from tests.sae.adam import adam_settings

pytest.importorskip("triton", reason="Triton is not installed on this system")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
from saekit.sae.kernels import triton_ops  # noqa: E402  # tests/conftest.py has switched the interpreter on

SIZES = [(7, 5, 33, 4), (20, 16, 128, 8), (1, 3, 9, 1), (5, 8, 6, 6), (0, 4, 10, 2), (33, 70, 300, 3)]
# NumPy 2.4 and newer say so of what Triton 3.6's interpreter does.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
NEAR = {"rtol": 1e-5, "atol": 1e-5}
ROUNDED = {"rtol": 2**-6, "atol": 2**-6}
"""To bfloat16, before the bias and with it; the interpreter cuts a bfloat16's last bits off, where a GPU rounds."""


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def chosen(N, M, K, seed=1):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(M, generator=generator)[:K] for _ in range(N)]
    return (torch.stack(rows) if rows else torch.empty(0, K, dtype=torch.int64)).to(DEVICE)


@pytest.mark.parametrize("size", SIZES)
class TestAgainstFormulas:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_topk(self, size, dtype, monkeypatch):
        N, D, M, K = size
        x, W, b = numbers(N, D), numbers(M, D, seed=1), numbers(M, seed=2)
        for rows in (1000, 16):  # in one piece and in chunks of tokens
            monkeypatch.setattr(triton_ops, "CHUNK_BYTES", rows * 64 * triton_ops.GROUP * dtype.itemsize)
            values, indices = triton_ops.topk(x, W, b, K, dtype)
            scores = x.to(dtype).float() @ W.to(dtype).float().T + b
            near = NEAR if dtype == torch.float32 else ROUNDED
            torch.testing.assert_close(values.float(), scores.topk(K).values, **near)
            torch.testing.assert_close(scores.gather(1, indices), values.float(), **near)
            assert (indices.sort().values.diff() > 0).all()
            assert (values.float().diff() <= 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_topk_of_parts(self, size, dtype, monkeypatch):
        N, D, M, K = size
        M = M // K * K
        x, W, b = numbers(N, D), numbers(M, D, seed=1), numbers(M, seed=2)
        monkeypatch.setattr(triton_ops, "CHUNK_BYTES", 16 * 64 * triton_ops.GROUP * dtype.itemsize)
        values, indices = triton_ops.topk(x, W, b, K, dtype, parts=K)
        scores = x.to(dtype).float() @ W.to(dtype).float().T + b
        near = NEAR if dtype == torch.float32 else ROUNDED
        torch.testing.assert_close(values.float(), eager.topk_in_parts(scores, K, K)[0], **near)
        torch.testing.assert_close(scores.gather(1, indices), values.float(), **near)
        assert torch.equal((indices // (M // K)).cpu(), torch.arange(K).expand(N, K))

    def test_gather_dot(self, size, monkeypatch):
        N, D, M, K = size
        x, W, indices = numbers(N, D), numbers(M, D, seed=1), chosen(N, M, K)
        expected = torch.einsum("nd,nkd->nk", x, W[indices])
        for rows in (1000, 7):  # in one piece and in chunks of tokens
            slices = -(-D // triton_ops.SLICE)
            monkeypatch.setattr(triton_ops, "PARTIAL_BYTES", 4 * slices * K * rows)
            torch.testing.assert_close(triton_ops.gather_dot(x, W, indices), expected, **NEAR)

    def test_gather_sum(self, size):
        N, D, M, K = size
        weights, W, indices = numbers(N, K), numbers(M, D, seed=1), chosen(N, M, K)
        expected = torch.einsum("nk,nkd->nd", weights, W[indices])
        torch.testing.assert_close(triton_ops.gather_sum(weights, indices, W), expected, **NEAR)

    def test_segment_sum(self, size):
        N, D, M, K = size
        rows, weights = numbers(N, D), numbers(N * K, seed=1)
        latents, order = chosen(N, M, K).flatten().sort(stable=True)
        tokens = order // K
        starts = torch.searchsorted(latents, torch.arange(M + 1, device=DEVICE))
        expected = torch.zeros(M, D, device=DEVICE).index_add_(0, latents, weights[:, None] * rows[tokens])
        torch.testing.assert_close(triton_ops.segment_sum(weights, tokens, starts, rows), expected, **NEAR)

    def test_values_and_gradients_are_eager_s(self, size):
        N, D, M, K = size
        found = []
        for kernels in (Sparse("triton", triton_ops), eager):
            leaves = [
                numbers(N, D),
                numbers(M, D, seed=1),
                numbers(M, seed=2),
                numbers(M, D, seed=3),
                numbers(D, seed=4),
            ]
            for leaf in leaves:
                leaf.requires_grad_()
            out, acts, _ = kernels.autoencode(*leaves, K)
            gradients = torch.autograd.grad([out, acts], leaves, [numbers(N, D, seed=5), numbers(N, K, seed=6)])
            found.append([out, acts, *gradients])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "unit_rows"), [((9, 70), True), ((9, 70), False), ((1500,), False), ((1, 1), False)])
def test_adam_is_eager_s(shape, unit_rows, dtype):
    found = []
    for adam_ in (triton_ops.adam_, eager.adam_):
        param = numbers(*shape)
        if unit_rows:
            param[3] = 0  # such a row stays
            param /= row_norms(param)
        moments = [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(2)]
        for step in range(1, 4):
            grad = numbers(*shape, seed=step)
            if unit_rows:
                grad[3] = 0
            adam_(param, grad, *moments, **adam_settings(step, betas=(0.9, 0.999), unit_rows=unit_rows, device=DEVICE))
        found.append((param, *moments))
    # The interpreter cuts a bfloat16's last bits off, where a GPU rounds to nearest.
    near = NEAR if dtype == torch.float32 else {"rtol": 2**-6, "atol": 1e-2}
    torch.testing.assert_close(*found, **near)
    assert not unit_rows or not found[0][0][3].any()


def test_an_sae_trains_with_them_as_with_the_others():
    losses = []
    for backend in ("triton", "cpu", "eager"):
        sae = Sae(12, 48, 4, generator=torch.Generator().manual_seed(0), device=DEVICE)
        sae.chosen_kernels = choose_kernels(backend, "fp32", DEVICE)
        assert sae.kernels.name == backend
        x = numbers(30, 12)
        loss = (sae(x).recon - x).square().mean()
        loss.backward()
        losses.append([float(loss.detach()), float(sae.W_enc.grad.norm()), float(sae.W_dec.grad.norm())])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="this is about systems without a CUDA device")
def test_without_a_gpu_they_are_refused(monkeypatch):
    monkeypatch.setattr(triton_ops, "INTERPRETED", False)
    with pytest.raises(ValueError, match="triton kernels need a CUDA device"):
        choose_kernels("triton", "fp32", DEVICE)
    assert choose_kernels("auto", "fp32", DEVICE).name in ("cpu", "native")


@pytest.mark.parametrize("size", SIZES)
def test_adam_of_sums_is_adam_of_the_gradient(size):
    N, D, M, K = size
    order, tokens, starts = triton_ops.sort_pairs(chosen(N, M, K), M)
    sums = RowSums(numbers(N, K, seed=2).flatten()[order], tokens, starts, numbers(N, D))
    states = [[numbers(M, D, seed=3), *torch.zeros(2, M, D, device=DEVICE)] for _ in range(2)]
    settings = adam_settings(1, betas=(0.9, 0.999), unit_rows=True, device=DEVICE)
    triton_ops.adam_(states[0][0], sums, *states[0][1:], **settings)
    triton_ops.adam_(states[1][0], sums.dense(), *states[1][1:], **settings)
    for got, expected in zip(*states, strict=True):
        torch.testing.assert_close(got, expected, **NEAR)
