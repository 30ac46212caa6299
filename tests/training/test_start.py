"""Initial weights made of the first batch."""

import pytest
import torch

from saekit import Sae
from saekit.training.start import ROWS, Sample, fit_
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


def sample_of(x_ND, sizes, seed=3):
    """The rows that ranks take together; `sizes[micro][rank]` tokens lie where the whole batch's go in that order."""
    pieces = iter(x_ND.split([size for row in sizes for size in row]))
    dealt = [[next(pieces) for _ in row] for row in sizes]
    counts = [[row[rank] for row in sizes] for rank in range(len(sizes[0]))]
    together = 0
    for rank in range(len(sizes[0])):
        sample = Sample(counts[rank], seed, Rank(rank, counts))
        for micro, row in enumerate(dealt):
            sample.add(micro, "h.0", row[rank])
        sample.complete()
        together = together + sample.rows["h.0"]
    return together


@pytest.mark.parametrize("sizes", [[[25, 5]], [[10], [10], [10]], [[7, 0, 8], [9, 6, 0]]])
def test_a_sample_does_not_depend_on_who_holds_the_tokens(sizes):
    x_ND = torch.randn(ROWS + 10, 4)
    sizes = [[size * (ROWS + 10) // 30 for size in row] for row in sizes]
    sizes[0][0] += len(x_ND) - sum(map(sum, sizes))
    expected = sample_of(x_ND, [[len(x_ND)]])
    assert torch.equal(sample_of(x_ND, sizes), expected)
    assert len(expected.unique(dim=0)) == ROWS, "no token twice"
    assert all((row == x_ND).all(1).any() for row in expected)
    assert not torch.equal(sample_of(x_ND, [[len(x_ND)]], seed=4), expected)


def test_a_sample_of_a_small_batch_is_the_batch():
    x_ND = torch.randn(6, 4)
    assert torch.equal(sample_of(x_ND, [[6]]).sort(0).values, x_ND.sort(0).values)


def test_the_first_reconstructions_fit_best():
    rows_RD = torch.randn(60, 16)
    sae = Sae(16, 64, 8)
    W_dec = sae.W_dec.detach().clone()
    fit_(sae, rows_RD)
    assert torch.equal(sae.W_dec, W_dec)
    assert torch.allclose(sae.W_enc.norm(dim=1), sae.W_enc.norm(dim=1)[0])
    whole = sae(rows_RD).recon.detach()

    def error(factor):
        return float((rows_RD - factor * whole).square().sum())

    assert error(1.0) < min(error(0.98), error(1.02), float(rows_RD.square().sum()))


def test_runs_begin_alike_whatever_the_micro_batches(make_trainer):
    whole = make_trainer("whole", lr=1e-9, batch_size=8, init="fit").fit()
    split = make_trainer("split", lr=1e-9, batch_size=2, grad_acc_steps=4, init="fit").fit()
    near = {"rtol": 1e-4, "atol": 1e-5}
    found, expected = ({k: v for k, v in tensors_of(each).items() if "/sae/" in k} for each in (split, whole))
    assert_same_tensors(found, expected, **near)
    uniform = tensors_of(make_trainer("uniform", lr=1e-9, init="uniform").fit())
    assert all(
        torch.allclose(uniform[name], value, atol=1e-5) == ("encoder.w" not in name) for name, value in expected.items()
    )
