"""Plans of runs at hookpoints of several widths."""

import pytest

from saekit.config import RunConfig
from saekit.planning import Machine, make_plan
from saekit.views.plan import _read_and_written


def test_a_plan_of_several_widths_is_the_sum_of_its_units(model_dir):
    """Parameters, and the bytes that travel, of SAEs on the residual stream and on the twice as wide MLP."""

    def planned(hookpoints, ranks=1):
        values = {"model": str(model_dir), "dataset": "", "hookpoints": hookpoints, "expansion_factor": 2, "k": 4}
        plan = make_plan(RunConfig.from_flat(values), Machine("cpu", ranks, 2**36, "", ""))
        return {choice.placement: choice for choice in plan.choices}

    names = ["layers.0", "layers.1.mlp.down_proj:in", "layers.2.mlp"]
    for ranks, placement in ((1, "single"), (2, "ddp"), (2, "zero3")):
        parts = [planned(name, ranks)[placement] for name in names]
        together = planned(",".join(names), ranks)[placement]
        parameters = [each.memory.peak.parameters.total for each in parts]
        assert together.memory.peak.parameters.total == pytest.approx(sum(parameters), abs=4)
        assert together.sent == pytest.approx(sum(each.sent for each in parts), abs=4)
        assert parameters[1] > 3.5 * parameters[0]
    # The wide SAE costs four times as much as each of the others: it has a rank of its own.
    layer_map = planned(",".join(names), 2)["layer-map"]
    assert layer_map.layers_of_busiest == 1
    assert layer_map.memory.peak.parameters.total == parameters[1] * 2
    # But the three narrow ones on another rank read more numbers per token, and the step waits for them to travel.
    plan = planned("layers.*,layers.{0-1}.mlp,layers.1.mlp.down_proj:in", 3)["layer-map"]
    assert plan.layers_of_busiest == 1
    assert plan.sent == 2 * 3 * planned("layers.0", 2)["layer-map"].sent


def test_a_transcoder_is_sent_what_it_reads_and_writes_and_a_crosscoder_holds_all_it_joins(model_dir):
    def planned(**coders):
        values = {"model": str(model_dir), "dataset": "", "num_latents": 64, "k": 4, **coders}
        plan = make_plan(RunConfig.from_flat(values), Machine("cpu", 2, 2**36, "", ""))
        return {choice.placement: choice for choice in plan.choices}

    sae = planned(hookpoints="layers.0")
    read_and_written = {"reads": "layers.1.mlp.down_proj:in", "writes": "layers.1.mlp"}
    transcoder, skip = planned(**read_and_written), planned(**read_and_written, skip_connection=True)
    crosscoder = planned(crosscode="layers.0,layers.1.mlp.down_proj:in")
    for each in (transcoder, skip, crosscoder):
        assert each["layer-map"].sent == 3 * sae["layer-map"].sent
    numbers = 64 * (32 + 16) + 64 + 16
    held = [each["ddp"].memory.peak.parameters.total for each in (transcoder, skip, crosscoder)]
    assert held == pytest.approx([4 * numbers, 4 * (numbers + 16 * 32), 4 * (2 * 64 * 48 + 64 + 48)], rel=0.02)
    assert skip["zero3"].sent > transcoder["zero3"].sent


def test_two_models_cost_what_each_costs(model_dir):
    """Weights and operations of both, and activations of both at once; the crosscoders join them."""

    def planned(**more):
        values = {"model": str(model_dir), "dataset": "", "num_latents": 64, "k": 4, "layers": "0,1", **more}
        plan = make_plan(RunConfig.from_flat(values), Machine("cpu", 2, 2**36, "", ""))
        return plan.job, {choice.placement: choice for choice in plan.choices}

    (one, alone), (two, both) = planned(), planned(crosscode_models=str(model_dir))
    assert two.lm.weights.total == 2 * one.lm.weights.total
    assert two.lm.flops_per_token == 2 * one.lm.flops_per_token
    assert two.lm.blocks == 2 * one.lm.blocks
    kept = 2 * one.tokens * 16 * one.dtype.itemsize
    assert two.lm.forward.total == one.lm.forward.total + kept
    assert [each.site.d_in for each in two.units] == [32, 32]
    assert both["layer-map"].sent == 2 * alone["layer-map"].sent
    assert "other.layers.{0,1}" in " ".join(_read_and_written(two))
