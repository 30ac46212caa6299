"""What a bank counts: firings, tokens without firing, sums; alone and of units of several sizes."""

import pytest
import torch

from saekit import Sae, SaeConfig, TrainConfig
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import autoencoder
from saekit.placement import Single
from saekit.sae.selection.topk import TopK
from saekit.training.bank import Bank, stacked
from saekit.training.optimizers import make_optimizer
from saekit.training.plan import UnitPlan
from saekit.training.statistics import SUMS, Segments, Tally, read_tally
from saekit.training.unit import Calibration

CPU = torch.device("cpu")


def bank_of(widths, num_latents=8, dead_threshold=11, **options):
    """A bank in one process; `widths` by hookpoint."""
    cfg = TrainConfig(sae=SaeConfig(num_latents=num_latents, k=2), **{"kernels": "eager", **options})
    placement = Single(CPU)
    placement.place(
        list(widths),
        lambda name: Sae(**cfg.sae.sizes(widths[name], num_latents), generator=torch.Generator().manual_seed(0)),
        lambda sae: make_optimizer(cfg, sae),
    )
    known = {name: Calibration(torch.zeros(width), 2.0) for name, width in widths.items()}
    plans = [
        UnitPlan(autoencoder(Hookpoint(name, d)), num_latents, 0.0, (1.0, 1.0), dead_threshold)
        for name, d in widths.items()
    ]
    return Bank(cfg, placement, plans, known)


def step(bank, fired, tokens):
    """A step in which each latent fired the given number of times."""
    bank.begin_(tokens)
    for unit, counts in zip(bank.units.values(), fired, strict=True):
        unit.fired_M += torch.tensor(counts)
        unit.backward((unit.sae.W_dec * 0).sum())
    message = bank.finish(bank.placement.collect())()
    bank.placement.skip()
    return message


def test_counting_in_tokens():
    bank = bank_of({"h.0": 4}, num_latents=5)
    bank.advance_(step(bank, [[0, 0, 0, 1, 0]], tokens=10))
    assert bank.since_fired_F.tolist() == [10, 10, 10, 0, 10]
    assert bank.fire_count_F.tolist() == [0, 0, 0, 1, 0]
    message = step(bank, [[3, 0, 0, 0, 0]], tokens=7)
    assert bank.since_fired_F.tolist() == [10, 10, 10, 0, 10], "until the step counts"
    assert message.num_dead == {"h.0": 3}
    bank.advance_(message)
    assert bank.since_fired_F.tolist() == [0, 17, 17, 7, 17]
    assert bank.fire_count_F.tolist() == [3, 0, 0, 1, 0]


def test_dead_means_not_fired_in_the_last_threshold_tokens():
    bank = bank_of({"h.0": 4}, num_latents=5, dead_threshold=10, auxk_alpha=1 / 32)
    bank.advance_(step(bank, [[0, 0, 1, 0, 0]], tokens=10))
    assert bank.num_dead == {"h.0": 4}
    bank.begin_(10)
    unit = bank.units["h.0"]
    assert unit.dead_M.tolist() == [True, True, False, True, True]
    assert unit.aux_latents.tolist() == [0, 1, 3, 4]
    assert not unit.fired_M.any(), "each step counts from zero"


def test_chosen_at_zero_is_not_fired():
    bank = bank_of({"h.0": 4})
    unit = bank.units["h.0"]
    with torch.no_grad():
        unit.sae.b_enc.fill_(-100.0)
        unit.sae.b_enc[3] = 100.0
    bank.begin_(6)
    unit.run_(torch.randn(6, 4))
    assert unit.fired_M.tolist() == [0, 0, 0, 6, 0, 0, 0, 0]


def test_units_of_several_sizes():
    sizes = Segments([3, 1, 4], CPU)
    flat = torch.tensor([5, 0, 7, 2, 1, 1, 9, 9])
    assert [view.tolist() for view in sizes.views(flat)] == [[5, 0, 7], [2], [1, 1, 9, 9]]
    assert sizes.counts(flat).tolist() == [12, 2, 20]
    assert sizes.at_least(flat, torch.tensor([5, 3, 9])).tolist() == [
        True,
        False,
        True,
        False,
        False,
        False,
        True,
        True,
    ]
    alike = Segments([4, 4], CPU)
    assert alike.counts(flat).tolist() == [14, 20]
    assert alike.at_least(flat, torch.tensor([7, 9])).tolist() == [False, False, True, False, False, False, True, True]
    assert Segments([], CPU).counts(flat[:0]).tolist() == []


def test_sums_of_a_part_of_the_units_find_their_places():
    widths = [2, 3, 1]
    part, whole = Tally([3, 1], CPU), Tally(widths, CPU)
    part.sums_U7[:] = torch.arange(14.0).view(2, 7)
    part.means[0].copy_(torch.tensor([1.0, 2.0, 3.0]))
    part.means[1].fill_(4.0)
    whole.flat.index_copy_(0, part.places([1, 2], widths), part.flat)
    assert whole.sums_U7[1:].flatten().tolist() == list(range(14))
    assert [mean.tolist() for mean in whole.means] == [[0, 0], [1, 2, 3], [4]]
    assert not whole.sums_U7[0].any()


@pytest.mark.parametrize("widths", [{"h.0": 4, "h.1": 4}, {"h.0": 4, "h.1": 6, "h.2": 4}], ids=["alike", "not alike"])
def test_a_report_in_the_message_is_the_one_asked_for_later(widths):
    """And is of the steps since the last one, those left out excepted."""
    bank = bank_of(widths)
    generator = torch.Generator().manual_seed(0)

    def one_step(report=False, spoil=False):
        bank.begin_(6)
        for unit in bank.units.values():
            unit.run_(torch.randn(6, unit.sae.d_in, generator=generator) * (float("nan") if spoil else 1))
        message = bank.finish(bank.placement.collect(), report=report)()
        bank.placement.skip()
        return message

    bank.advance_(one_step())
    spoilt = one_step(report=True, spoil=True)
    assert set(spoilt.faults) == set(widths)
    assert set(spoilt.faults.values()) == {"activations"}
    assert spoilt.report == bank.report()
    message = one_step(report=True)
    bank.advance_(message)
    assert message.report == bank.report()
    assert all(1 < layer.l0 <= 2 and layer.fvu > 0 for layer in message.report.values())
    bank.clear_window()
    assert all(layer.fvu != layer.fvu for layer in bank.report().values()), "not a number: of no token"


def test_a_tally_is_read_as_ratios():
    tally = Tally([2], CPU)
    tally.sums_U7[0] = torch.tensor([3.0, 6.0, 40.0, 1.5, 0.5, 16.0, 10.0])
    tally.means[0].copy_(torch.tensor([10.0, 0.0]))
    assert len(SUMS) == 7
    found = read_tally(tally.flat, 0, [2], tokens=12, steps=2, dead=3, num_latents=8, with_multi_topk=True)
    assert (found.fvu, found.multi_topk_fvu) == (3 / 6, 6 / 6), "16 less the square of the sum over the tokens"
    assert (found.l0, found.loss, found.auxk_loss, found.dead) == (4.0, 0.75, 0.25, 3)
    assert found.too_long == pytest.approx(2 / 12)


def test_selections_that_are_alike_move_together():
    """Those with another k, size or state are in groups of their own; each has its own state still."""

    class PerLatent(TopK):
        def __init__(self, k, num_latents, start=0.0):
            super().__init__(k, num_latents)
            self.level = torch.full((num_latents,), start)

        def state(self):
            return {"level": self.level}

        def move_(self, firings, tokens, sums, rms):
            self.level += (firings / tokens)[..., None]

    selections = [PerLatent(2, 8, 1.0), PerLatent(2, 6, 2.0), PerLatent(2, 8, 3.0)]
    groups = stacked(selections, CPU)
    assert [at.tolist() for _, at in groups] == [[0, 2], [1]]
    firings = torch.tensor([10, 20, 30])
    for whole, at in groups:
        whole.move_(firings[at], torch.full_like(at, 10), firings[at, None], torch.ones(len(at)))
    assert [each.level.unique().tolist() for each in selections] == [[2.0], [4.0], [6.0]]
    assert [each.level.shape[0] for each in selections] == [8, 6, 8]
