"""The planner's maps and formulae, against maps by hand, brute force and sums written out."""

from dataclasses import replace
from itertools import product

import pytest

from saekit.errors import UserError
from saekit.placement.planner import Traffic, Workload, balanced_map, memory, parse_map, resolve_map, traffic


def names(count):
    return [f"layers.{number}" for number in range(count)]


@pytest.mark.parametrize(
    ("layers", "ranks", "owners"),
    [
        (6, 2, [0, 0, 0, 1, 1, 1]),
        (5, 2, [0, 0, 0, 1, 1]),
        (7, 3, [0, 0, 0, 1, 1, 2, 2]),
        (4, 1, [0, 0, 0, 0]),
        (2, 4, [0, 1]),
        (0, 2, []),
    ],
)
@pytest.mark.parametrize("cost", [None, 3.5])
def test_equal_costs_give_contiguous_blocks(layers, ranks, owners, cost):
    costs = None if cost is None else dict.fromkeys(names(layers), cost)
    found = balanced_map(names(layers), ranks, costs)
    assert list(found) == names(layers)
    assert list(found.values()) == owners


def test_the_most_expensive_layers_go_first():
    costs = dict(zip(names(5), [1.0, 1.0, 5.0, 4.0, 2.0], strict=True))
    # 5 → rank 0, 4 → rank 1, 2 → rank 1 (4 < 5), 1 → rank 0 (5 < 6), 1 → rank 0 (a tie at 6: the lower rank).
    assert balanced_map(names(5), 2, costs) == dict(zip(names(5), [0, 0, 0, 1, 1], strict=True))
    assert list(balanced_map(names(5), 2, costs)) == names(5)


def test_many_costs_stay_within_grahams_bound():
    for costs in product((1.0, 2.0, 3.0, 7.0), repeat=5):
        by_name = dict(zip(names(5), costs, strict=True))
        owner = balanced_map(names(5), 2, by_name)
        busiest = max(sum(by_name[name] for name in owner if owner[name] == rank) for rank in range(2))
        best = min(
            max(sum(c for c, r in zip(costs, at, strict=True) if r == rank) for rank in range(2))
            for at in product(range(2), repeat=5)
        )
        assert busiest <= 4 / 3 * best


def test_a_missing_cost_and_no_ranks_are_errors():
    with pytest.raises(KeyError):
        balanced_map(names(2), 2, {"layers.0": 1.0})
    with pytest.raises(ValueError, match="world_size is 0"):
        balanced_map(names(2), 0)


def test_maps_are_read():
    assert parse_map("0-2:0,3-5:1") == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    assert parse_map(" 7:1 , 2:0") == {7: 1, 2: 0}
    assert parse_map("3-3:12") == {3: 12}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "should be layers and their rank"),
        ("0-5", "'0-5' should be layers and their rank"),
        ("0-5:", "should be layers and their rank"),
        ("0-5:0,", "'' should be layers and their rank"),
        ("0-10:2:1", "should be layers and their rank"),
        ("-1:0", "should be layers and their rank"),
        ("0:-1", "should be layers and their rank"),
        ("0:0 1:1", "should be layers and their rank"),
        ("0-99999999:0", "should be layers and their rank"),
        ("5-0:1", "empty; write 0-5"),
        ("0-3:0,3-5:0", "layer 3 is there twice"),
        ("4:0,4:1", "layer 4 is there twice"),
    ],
)
def test_maps_that_cannot_be_read(text, complaint):
    with pytest.raises(ValueError, match=complaint) as raised:
        parse_map(text)
    assert str(raised.value).startswith(f"--layer-map {text!r}")


def test_a_map_is_resolved_by_layer_number():
    layers, hookpoints = (4, 8, 9), ("h.4", "h.8", "h.9")
    assert resolve_map("8-9:0,4:2", layers, hookpoints, 3) == {"h.4": 2, "h.8": 0, "h.9": 0}
    assert resolve_map(None, layers, hookpoints, 2) == {"h.4": 0, "h.8": 0, "h.9": 1}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0:0", "gives no rank for layers 1, 2: every"),
        ("0-1:0", "gives no rank for layer 2: every"),
        ("0-5:0", "names layers 3, 4, 5, not trained"),
        ("0-2:2", "there is no rank 2; the last of 2 is 1"),
        ("nonsense", "should be layers"),
    ],
)
def test_a_map_has_to_fit(text, complaint):
    with pytest.raises(UserError, match=complaint):
        resolve_map(text, range(3), names(3), 2)


LOAD = Workload(layers=3, d_in=8, num_latents=30, world_size=2, tokens=50, act_bytes=2, backend="nccl")
PARAMS = 30 * 8 + 30 + 30 * 8 + 8
"""W_enc, b_enc, W_dec, b_dec."""


def test_parameters_are_those_of_the_sae():
    from saekit import Sae

    assert LOAD.params == PARAMS == sum(parameter.numel() for parameter in Sae(8, 30, 4).parameters())


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ddp_reduces_gradients_and_counts_around_a_ring(ranks):
    load = replace(LOAD, world_size=ranks, micro_batches=4, chunks=2)
    # 2 (W - 1) rounds of a W-th of the tensor; however many backward passes went before.
    expected = round(3 * 4 * (PARAMS + 30) / ranks * 2 * (ranks - 1))
    assert traffic("ddp", load) == traffic("ddp", replace(load, backend="gloo")) == Traffic(expected, expected)


@pytest.mark.parametrize(("backend", "rounds"), [("nccl", 3), ("gloo", 4)])
def test_zero3_gathers_twice_and_scatters_once_per_pass(backend, rounds):
    load = replace(LOAD, micro_batches=2, chunks=5, backend=backend)
    # On two ranks each of the rounds moves half a tensor; on gloo the scatter is two of them.
    expected = 3 * 4 * PARAMS * 10 * rounds // 2 + 3 * 4 * 30
    assert traffic("zero3", load) == Traffic(expected, expected)


def test_zero3_needs_row_norms_only_where_rows_are_cut():
    whole, cut = (replace(LOAD, world_size=ranks, num_latents=30) for ranks in (3, 4))
    assert traffic("zero3", whole).sent == round(3 * 2 / 3 * (4 * 3 * PARAMS + 4 * 2 * 30))
    # Beside the fired counts three more all-reduces of a vector.
    assert traffic("zero3", cut).sent == round(3 * 3 / 4 * (4 * 3 * PARAMS + 4 * 2 * 30 + 3 * 4 * 2 * 30))


@pytest.mark.parametrize("owners", [(0, 0, 1), (0, 1, 1), (0, 0, 0), (2, 1, 0), (0, 3, 3)])
def test_layer_map_moves_every_activation_to_its_owner_once(owners):
    ranks = max(owners) + 1
    load = replace(LOAD, world_size=ranks)
    each = [traffic("layer-map", load, owners.count(rank)) for rank in range(ranks)]
    sent, received = [0] * ranks, [0] * ranks
    for source, target in product(range(ranks), owners):
        if source != target:
            sent[source] += 50 * 8 * 2
            received[target] += 50 * 8 * 2
    assert each == [Traffic(*pair) for pair in zip(sent, received, strict=True)]


def test_layer_map_does_not_depend_on_the_dictionary_or_the_cuts():
    assert traffic("layer-map", LOAD, 1) == traffic("layer-map", replace(LOAD, num_latents=4096, chunks=7), 1)
    assert traffic("layer-map", replace(LOAD, act_bytes=4), 1).sent == 2 * traffic("layer-map", LOAD, 1).sent


@pytest.mark.parametrize("placement", ["ddp", "zero3", "layer-map"])
def test_one_rank_alone_exchanges_nothing(placement):
    assert traffic(placement, replace(LOAD, world_size=1), 3) == Traffic(0, 0)


def test_memory_of_adam():
    assert memory("ddp", LOAD) == 16 * PARAMS * 3
    assert memory("zero3", replace(LOAD, world_size=4)) == 16 * PARAMS * 3 // 4
    assert [memory("layer-map", LOAD, owned) for owned in (0, 1, 3)] == [0, 16 * PARAMS, 16 * PARAMS * 3]


def test_memory_of_another_optimiser():
    assert memory("ddp", LOAD, state=2) == 10 * PARAMS * 3
    assert memory("zero3", LOAD, state=2) == 10 * PARAMS * 3 // 2
    assert memory("layer-map", LOAD, 2, state=4) == 12 * PARAMS * 2
