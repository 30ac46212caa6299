import torch

from saekit.sae.selection.topk import TopK
from saekit.training.counters import LayerCounters


def fresh():
    return LayerCounters.fresh(5, torch.device("cpu"))


def test_chosen_at_zero_is_not_fired():
    counters = fresh()
    fired_NK = TopK(2, 5).fired(torch.tensor([[2.0, 0.0], [1.0, 0.5]]))
    counters.observe(fired_NK, torch.tensor([[0, 1], [0, 2]]))
    assert counters.fired_now_M.tolist() == [2, 0, 1, 0, 0]


def test_counting_in_tokens():
    counters = fresh()
    counters.observe(torch.tensor([[True]]), torch.tensor([[3]]))
    counters = counters.after(counters.fired_now_M, tokens=10)
    assert counters.tokens_since_fired_M.tolist() == [10, 10, 10, 0, 10]
    assert counters.fire_count_M.tolist() == [0, 0, 0, 1, 0]
    assert not counters.fired_now_M.any()
    counters.observe(torch.tensor([[True]]), torch.tensor([[0]]))
    counters = counters.after(counters.fired_now_M, tokens=7)
    assert counters.tokens_since_fired_M.tolist() == [0, 17, 17, 7, 17]


def test_dead_means_silent_for_the_last_threshold_tokens():
    counters = fresh()
    counters = counters.after(torch.tensor([0, 0, 1, 0, 0]), tokens=10)
    assert counters.count_dead(10) == 4
    assert counters.dead(10, 4).tolist() == [0, 1, 3, 4]
    assert counters.count_dead(11) == 0
    assert counters.dead(11, 0).tolist() == []


def test_tokens_of_other_ranks_count():
    counters = fresh()
    elsewhere = torch.tensor([0, 4, 0, 0, 0])  # fired on another rank only
    counters = counters.after(counters.fired_now_M + elsewhere, tokens=20)
    assert counters.tokens_since_fired_M.tolist() == [20, 0, 20, 20, 20]
    assert counters.fire_count_M.tolist() == [0, 4, 0, 0, 0]
