"""Gradients that are kept as what they are the sums of."""

import pytest
import torch

from saekit.sae.kernels import native_ops, torch_ops
from saekit.sae.kernels.row_sums import RowSums, defer_gradient, try_to_defer
from tests.sae.adam import adam_settings
from tests.sae.native import needs_native

OPS = [pytest.param(torch_ops, id="cpu"), pytest.param(native_ops, id="native", marks=needs_native)]
SIZES = [(7, 33, 5, 4), (1, 1, 1, 1), (64, 40, 17, 8), (0, 10, 4, 2)]


def row_sums(N, M, D, K, dtype=torch.float32):
    generator = torch.Generator().manual_seed(M)
    indices = torch.randint(0, M, (N, K), generator=generator)
    order, tokens, starts = torch_ops.sort_pairs(indices, M)
    weights, rows = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((N, K), (N, D)))
    expected = torch.zeros(M, D, dtype=dtype)
    for n in range(N):
        for i in range(K):
            expected[indices[n, i]] += weights[n, i] * rows[n]
    return RowSums(weights.flatten()[order], tokens, starts, rows), expected


@pytest.mark.parametrize("size", SIZES)
def test_dense_is_the_sum(size):
    sums, expected = row_sums(*size, dtype=torch.float64)
    torch.testing.assert_close(sums.dense(), expected)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("size", SIZES)
def test_backends_sum_the_same(ops, size):
    sums, expected = row_sums(*size)
    torch.testing.assert_close(ops.segment_sum(*sums), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("unit_rows", [True, False])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_adam_of_sums_is_adam_of_the_gradient_bit_for_bit(ops, unit_rows, moments, size):
    sums, _ = row_sums(*size)
    start = torch.randn(size[1], size[2], generator=torch.Generator().manual_seed(0))
    states = [[start.clone(), torch.zeros_like(start, dtype=moments), torch.ones_like(start, dtype=moments)]] * 2
    states = [[each.clone() for each in state] for state in states]
    for step in (1, 2):
        settings = adam_settings(step, unit_rows=unit_rows)
        ops.adam_(states[0][0], sums, *states[0][1:], **settings)
        ops.adam_(states[1][0], ops.segment_sum(*sums), *states[1][1:], **settings)
    assert all(map(torch.equal, *states))
    assert torch.equal(states[0][0], start) == (size[0] == 0 and not unit_rows)


@needs_native
def test_a_token_that_is_not_there():
    sums, _ = row_sums(7, 33, 5, 4)
    sums.tokens_P[3] = 7
    moments = torch.zeros(33, 5), torch.zeros(33, 5)
    settings = adam_settings(1, unit_rows=True)
    with pytest.raises(IndexError, match="out of range for 7 rows"):
        native_ops.adam_(torch.ones(33, 5), sums, *moments, **settings)


@pytest.mark.parametrize("spoiled", ["weights_P", "rows_ND"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_the_bound_shows_what_is_not_finite(spoiled, number):
    sums, _ = row_sums(7, 33, 5, 4)
    assert sums.bound() >= sums.dense().abs().max()
    assert sums.bound().isfinite()
    getattr(sums, spoiled).view(-1)[4] = number
    assert not sums.bound().isfinite()


def test_the_bound_of_no_token():
    sums, _ = row_sums(0, 10, 4, 2)
    assert sums.bound() == 0


def test_the_bound_shows_sums_that_overflow():
    sums, _ = row_sums(7, 33, 5, 4)
    sums.weights_P.mul_(1e20)
    sums.rows_ND.mul_(1e20)
    assert not sums.dense().isfinite().all()
    assert not sums.bound().isfinite()


def test_only_what_saves_memory_is_deferred():
    sums, gradient = row_sums(7, 100, 50, 4)
    matrix = torch.ones_like(gradient)
    assert not try_to_defer(matrix, sums)
    deferred = defer_gradient(matrix)
    assert try_to_defer(matrix, sums)
    assert deferred == [sums]
    for larger in (row_sums(100, 100, 50, 4), row_sums(7, 100, 50, 300)):  # as many tokens; many latents of each
        assert not try_to_defer(matrix, larger[0])
    assert deferred == [sums]


def test_without_whoever_steps_it_a_matrix_has_its_gradient_again():
    sums, gradient = row_sums(7, 100, 50, 4)
    matrix = torch.ones_like(gradient)
    deferred = defer_gradient(matrix)
    assert try_to_defer(matrix, sums)
    del deferred
    assert not try_to_defer(matrix, sums)
