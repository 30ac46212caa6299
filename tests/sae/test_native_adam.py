"""A native step of Adam against the formulas, its moments in float32 and in bfloat16."""

import pytest
import torch

from saekit.planning.meter import Meter
from saekit.sae.kernels import eager, native_ops
from tests.sae.adam import adam_settings
from tests.sae.native import needs_native

SHAPES = [((7, 5), True), ((300, 96), True), ((7, 5), False), ((10_001,), False), ((), False)]
"""Shape, and whether its rows stay at norm 1."""


@needs_native
@pytest.mark.parametrize(("shape", "unit_rows"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-25], ids=["ordinary", "tiny"])
def test_adam(shape, unit_rows, scale):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator) * scale
    if unit_rows:
        start[3] = 0
    start = (start, start.double())  # the formulas in float64, in which a tiny row's square is not zero
    states = [[each.clone(), torch.zeros_like(each), torch.zeros_like(each)] for each in start]
    for step in (1, 2, 3):
        grad = torch.randn(shape, generator=generator)
        for adam_, (param, first, second) in zip((native_ops.adam_, eager.adam_), states, strict=True):
            settings = adam_settings(step, unit_rows=unit_rows)
            adam_(param, grad.to(param.dtype, copy=True), first, second, **settings)
    for got, expected in zip(*states, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize(("shape", "unit_rows"), SHAPES)
def test_adam_with_moments_in_bfloat16(shape, unit_rows):
    """Each from where the other was: what is rounded by odds may go up here and down there."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    if unit_rows:
        start[3] = 0
    states = [[start.clone(), *torch.zeros(2, *shape, dtype=torch.bfloat16)] for _ in range(2)]
    for step in range(1, 10):
        grad = torch.randn(shape, generator=generator)
        settings = adam_settings(step, unit_rows=unit_rows)
        for adam_, state in zip((native_ops.adam_, eager.adam_), states, strict=True):
            adam_(state[0], grad.clone(), *state[1:], **settings)
        torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-5, atol=1e-6)
        assert (states[0][1] != states[1][1]).sum() <= max(2, start.numel() / 1000)
        torch.testing.assert_close(states[0][2], states[1][2], rtol=2**-7, atol=0)
        for got, expected in zip(*states, strict=True):
            expected.copy_(got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_needs_no_memory_and_the_plan_says_so(dtype):
    matrix, *moments = torch.empty(2000, 512, device="meta"), *torch.empty(2, 2000, 512, dtype=dtype, device="meta")
    settings = adam_settings(1, unit_rows=True, device="meta")
    with Meter(on_gpu=False) as meter:
        native_ops.adam_(matrix, matrix, *moments, **settings)
        assert meter.peak.total == 0


@needs_native
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_moments_are_rounded_as_the_formulas_round_them(step):
    """Bit for bit, where nothing that goes before leaves a choice."""
    grad = torch.randn(10_001, generator=torch.Generator().manual_seed(step))
    grad[:4] = torch.tensor([torch.nan, torch.inf, 0.0, 1e-20])
    settings = adam_settings(step, betas=(0.0, 0.0))
    found = []
    for adam_ in (native_ops.adam_, eager.adam_):
        param, first, second = torch.zeros(10_001), *torch.ones(2, 10_001, dtype=torch.bfloat16)
        adam_(param, grad.clone(), first, second, **settings)
        found.append((first.view(torch.int16), second.view(torch.int16)))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got[1:], expected[1:])
    assert first[0].isnan()
    assert second.float()[4:].ne(grad[4:].square().bfloat16().float()).any(), "to the nearest"
