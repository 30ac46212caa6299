"""Initial weights made of the first batch."""

import pytest
import torch

from saekit import Sae
from saekit.training.start import MIX, Sample, start_from_data_
from tests.training.runs import assert_same_tensors, tensors_of


class Rank:
    """What a sample asks of a placement, for one of several ranks that run one after the other."""

    device = torch.device("cpu")

    def __init__(self, rank, counts):
        self.rank, self.counts, self.summed = rank, counts, []

    def gather(self, value):
        assert value == self.counts[self.rank]
        return self.counts

    def sum(self, value):
        self.summed.append(value)
        return value


def sample_of(x_ND, sizes, num_latents=20, seed=3):
    """The rows that ranks take together; `sizes[micro][rank]` tokens lie where the whole batch's go in that order."""
    pieces = iter(x_ND.split([size for row in sizes for size in row]))
    dealt = [[next(pieces) for _ in row] for row in sizes]
    counts = [[row[rank] for row in sizes] for rank in range(len(sizes[0]))]
    together = 0
    for rank in range(len(sizes[0])):
        sample = Sample(counts[rank], num_latents, seed, Rank(rank, counts))
        for micro, row in enumerate(dealt):
            sample.add(micro, "h.0", row[rank])
        sample.complete()
        together = together + sample.rows["h.0"]
    return together


@pytest.mark.parametrize("sizes", [[[25, 5]], [[10], [10], [10]], [[7, 0, 8], [9, 6, 0]]])
def test_a_sample_does_not_depend_on_who_holds_the_tokens(sizes):
    x_ND = torch.randn(30, 4)
    expected = sample_of(x_ND, [[30]])
    assert torch.equal(sample_of(x_ND, sizes), expected)
    assert len(expected.unique(dim=0)) == 20, "no token twice"
    assert all((row == x_ND).all(1).any() for row in expected)
    assert not torch.equal(sample_of(x_ND, [[30]], seed=4), expected)


def test_a_sample_of_a_small_batch_is_the_batch():
    x_ND = torch.randn(6, 4)
    assert torch.equal(sample_of(x_ND, [[6]]).sort(0).values, x_ND.sort(0).values)


def test_latents_begin_near_tokens():
    rows_RD = 7 * torch.randn(50, 256) + 3
    sae = Sae(256, 100, 4)
    sae.b_dec.data.fill_(3.0)
    start_from_data_(sae, rows_RD, torch.Generator().manual_seed(0))
    W_dec = sae.W_dec.detach()
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(100))
    tokens = torch.nn.functional.normalize(rows_RD - 3)
    assert (W_dec[:50] * tokens).sum(1).mean() == pytest.approx(MIX, abs=0.02)
    assert (W_dec[50:] * tokens).sum(1).mean() == pytest.approx(MIX, abs=0.02)
    assert (W_dec[:50] * W_dec[50:]).sum(1).mean() == pytest.approx(MIX**2, abs=0.02), "their noise differs"
    assert torch.equal(sae.b_enc, torch.zeros(100))


def test_the_first_reconstructions_fit_best():
    rows_RD = torch.randn(60, 16)
    sae = Sae(16, 64, 8)
    start_from_data_(sae, rows_RD, torch.Generator().manual_seed(0))
    whole = sae(rows_RD).recon.detach()

    def error(factor):
        return float((rows_RD - factor * whole).square().sum())

    assert error(1.0) < min(error(0.98), error(1.02), float(rows_RD.square().sum()))


def test_runs_begin_alike_whatever_the_micro_batches(make_trainer):
    whole = make_trainer("whole", lr=1e-9, batch_size=8, init="data").fit()
    split = make_trainer("split", lr=1e-9, batch_size=2, grad_acc_steps=4, init="data").fit()
    near = {"rtol": 1e-4, "atol": 1e-5}
    found, expected = ({k: v for k, v in tensors_of(each).items() if "/sae/" in k} for each in (split, whole))
    assert_same_tensors(found, expected, **near)
    random = tensors_of(make_trainer("random", lr=1e-9).fit())
    assert not any(torch.allclose(random[name], value) for name, value in expected.items() if "W_dec" in name)
