"""Maps of layers and each placement's formulas, against maps by hand, brute force and sums written out."""

from dataclasses import replace
from itertools import product

import pytest

from saekit.errors import UserError
from saekit.placement.choose import kind_of
from saekit.placement.costs import Size, Traffic, Workload
from saekit.placement.layer_map import balanced_map, parse_map, resolve_map


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
@pytest.mark.parametrize("cost", [1, 3.5])
def test_equal_costs_give_contiguous_blocks(layers, ranks, owners, cost):
    found = balanced_map(dict.fromkeys(names(layers), cost), ranks)
    assert list(found) == names(layers)
    assert list(found.values()) == owners


def test_the_most_expensive_layers_go_first():
    costs = dict(zip(names(5), [1.0, 1.0, 5.0, 4.0, 2.0], strict=True))
    # 5 → rank 0, 4 → rank 1, 2 → rank 1 (4 < 5), 1 → rank 0 (5 < 6), 1 → rank 0 (a tie at 6: the lower rank).
    assert balanced_map(costs, 2) == dict(zip(names(5), [0, 0, 0, 1, 1], strict=True))
    assert list(balanced_map(costs, 2)) == names(5)


def test_many_costs_stay_within_grahams_bound():
    for costs in product((1.0, 2.0, 3.0, 7.0), repeat=5):
        by_name = dict(zip(names(5), costs, strict=True))
        owner = balanced_map(by_name, 2)
        busiest = max(sum(by_name[name] for name in owner if owner[name] == rank) for rank in range(2))
        best = min(
            max(sum(c for c, r in zip(costs, at, strict=True) if r == rank) for rank in range(2))
            for at in product(range(2), repeat=5)
        )
        assert busiest <= 4 / 3 * best


def test_no_ranks_are_an_error():
    with pytest.raises(ValueError, match="world_size is 0"):
        balanced_map({"layers.0": 1.0}, 0)


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
        ("0-3:0,3-5:0", "names layer 3 twice"),
        ("4:0,4:1", "names layer 4 twice"),
    ],
)
def test_maps_that_cannot_be_read(text, complaint):
    with pytest.raises(ValueError, match=complaint) as raised:
        parse_map(text)
    assert str(raised.value).startswith(f"--layer-map {text!r}")


def test_a_map_is_resolved_by_layer_number():
    hookpoints = dict.fromkeys(("h.4", "h.8", "h.9"), 1)
    assert resolve_map("8-9:0,4:2", hookpoints, 3) == {"h.4": 2, "h.8": 0, "h.9": 0}
    assert resolve_map(None, hookpoints, 2) == {"h.4": 0, "h.8": 0, "h.9": 1}


def test_hookpoints_of_one_layer_share_its_rank_and_those_of_none_are_refused():
    assert resolve_map("0:1,1:0", {"layers.0": 4, "layers.0.mlp": 9, "layers.1": 4}, 2) == {
        "layers.0": 1,
        "layers.0.mlp": 1,
        "layers.1": 0,
    }
    with pytest.raises(UserError, match="maps layer numbers, but embed_tokens has none"):
        resolve_map("0:0", {"embed_tokens": 1, "layers.0": 1}, 2)
    assert resolve_map(None, {"embed_tokens": 1, "layers.0": 1}, 2) == {"embed_tokens": 0, "layers.0": 1}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0:0", "gives no rank for layers 1, 2: every"),
        ("0-1:0", "gives no rank for layer 2: every"),
        ("0-5:0", "names layers 3, 4, 5, not trained"),
        ("0-2:2", "names rank 2, but the last of 2 ranks is 1"),
        ("nonsense", "should be layers"),
    ],
)
def test_a_map_has_to_fit(text, complaint):
    with pytest.raises(UserError, match=complaint):
        resolve_map(text, dict.fromkeys(names(3), 1), 2)


LOAD = Workload(layers=3, size=Size(30, 8, 8), world_size=2, tokens=50, act_bytes=2, backend="nccl")
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
    assert (
        kind_of("ddp").traffic(load)
        == kind_of("ddp").traffic(replace(load, backend="gloo"))
        == Traffic(expected, expected)
    )


@pytest.mark.parametrize(("backend", "rounds"), [("nccl", 3), ("gloo", 4)])
def test_zero3_gathers_twice_and_scatters_once_per_pass(backend, rounds):
    load = replace(LOAD, micro_batches=2, chunks=5, backend=backend)
    # On two ranks each of the rounds moves half a tensor; on gloo the scatter is two of them.
    expected = 3 * 4 * PARAMS * 10 * rounds // 2 + 3 * 4 * 30
    assert kind_of("zero3").traffic(load) == Traffic(expected, expected)


def test_zero3_needs_row_norms_only_where_rows_are_cut():
    whole, cut = (replace(LOAD, world_size=ranks, size=Size(30, 8, 8)) for ranks in (3, 4))
    assert kind_of("zero3").traffic(whole).sent == round(3 * 2 / 3 * (4 * 3 * PARAMS + 4 * 2 * 30))
    # Beside the fired counts three more all-reduces of a vector.
    assert kind_of("zero3").traffic(cut).sent == round(3 * 3 / 4 * (4 * 3 * PARAMS + 4 * 2 * 30 + 3 * 4 * 2 * 30))


@pytest.mark.parametrize("owners", [(0, 0, 1), (0, 1, 1), (0, 0, 0), (2, 1, 0), (0, 3, 3)])
def test_layer_map_moves_every_activation_to_its_owner_once(owners):
    ranks = max(owners) + 1
    load = replace(LOAD, world_size=ranks)
    each = [kind_of("layer-map").traffic(load, owners.count(rank)) for rank in range(ranks)]
    sent, received = [0] * ranks, [0] * ranks
    for source, target in product(range(ranks), owners):
        if source != target:
            sent[source] += 50 * 8 * 2
            received[target] += 50 * 8 * 2
    assert each == [Traffic(*pair) for pair in zip(sent, received, strict=True)]


def test_layer_map_does_not_depend_on_the_dictionary_or_the_cuts():
    assert kind_of("layer-map").traffic(LOAD, 1) == kind_of("layer-map").traffic(
        replace(LOAD, size=Size(4096, 8, 8), chunks=7), 1
    )
    assert (
        kind_of("layer-map").traffic(replace(LOAD, act_bytes=4), 1).sent
        == 2 * kind_of("layer-map").traffic(LOAD, 1).sent
    )


@pytest.mark.parametrize("placement", ["single", "ddp", "zero3", "layer-map"])
def test_one_rank_alone_exchanges_nothing(placement):
    assert kind_of(placement).traffic(replace(LOAD, world_size=1), 3) == Traffic(0, 0)


def test_memory_of_adam():
    assert kind_of("ddp").memory(LOAD) == 16 * PARAMS * 3
    assert kind_of("zero3").memory(replace(LOAD, world_size=4)) == 16 * PARAMS * 3 // 4
    assert [kind_of("layer-map").memory(LOAD, owned) for owned in (0, 1, 3)] == [0, 16 * PARAMS, 16 * PARAMS * 3]


def test_memory_of_another_optimizer():
    assert kind_of("ddp").memory(LOAD, state=2) == 10 * PARAMS * 3
    assert kind_of("zero3").memory(LOAD, state=2) == 10 * PARAMS * 3 // 2
    assert kind_of("layer-map").memory(LOAD, 2, state=4) == 12 * PARAMS * 2


def test_what_each_placement_holds():
    hookpoints = dict.fromkeys(names(5), 1)
    for name, parts in (("single", 1), ("ddp", 1), ("zero3", 4)):
        kind = kind_of(name)
        assert [kind.holds(rank, hookpoints, 4) for rank in range(4)] == [tuple(hookpoints)] * 4
        assert (kind.parts(4), kind.rows(50, 4)) == (parts, 50)
    layer_map = kind_of("layer-map")
    assert [layer_map.holds(rank, hookpoints, 2, "0-3:1,4:0") for rank in range(2)] == [
        ("layers.4",),
        tuple(hookpoints)[:4],
    ]
    assert [len(layer_map.holds(rank, hookpoints, 2)) for rank in range(2)] == [3, 2]
    # By cost where sizes differ: an SAE on the MLP's hidden layer costs as much as four on the residual stream.
    mixed = {"layers.0": 1, "layers.0.mlp": 1, "layers.0.mlp.down_proj:in": 4, "layers.1": 1, "layers.1.mlp": 1}
    assert [layer_map.holds(rank, mixed, 2) for rank in range(2)] == [
        ("layers.0.mlp.down_proj:in",),
        ("layers.0", "layers.0.mlp", "layers.1", "layers.1.mlp"),
    ]
    assert (layer_map.parts(4), layer_map.rows(50, 4)) == (1, 200)


def test_activations_of_layers_that_have_trained_are_gone():
    for name in ("single", "ddp", "zero3"):
        assert [sum(kind_of(name).in_flight(number, 3, 3, 2)) for number in range(3)] == [3, 2, 1]


def test_activations_on_their_way_under_layer_map():
    # As `tests/placement/test_layer_map.py` counts them on real ranks: seven layers, rank 0 owns four.
    found = [kind_of("layer-map").in_flight(number, 4, 7, 2) for number in range(4)]
    assert found == [(2, 2, 2, 1, 1, 1), (2, 2, 2, 1), (2, 2, 1), (2,)]
