"""Sums over tokens: exact enough wherever the activations lie."""

import pytest
import torch

from saekit.training.statistics import Moments


@pytest.mark.parametrize("offset", [0.0, 300.0], ids=["around zero", "far from zero"])
def test_centred_moments_know_the_deviation(offset):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 16, generator=generator) + offset
    plain, centred = Moments.zero(16, x.device), Moments.zero(16, x.device)
    centre = x[:100].mean(0)
    for chunk in x.split(700):
        plain.add(chunk)
        centred.add_centred(chunk, centre)
    expected = float((x.double() - x.double().mean(0)).square().sum())
    assert float(plain.deviation()) == pytest.approx(expected, rel=1e-9)
    assert float(centred.deviation()) == pytest.approx(expected, rel=1e-6)
    assert float(centred.total_variance()) == pytest.approx(expected / 5000, rel=1e-6)
