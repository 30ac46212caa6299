"""Step times on given rates, computed by hand; the fit; which placement is then recommended."""

from dataclasses import replace

import pytest

from saekit.config import RunConfig
from saekit.planning import Machine, make_plan
from saekit.planning.calibration import nonnegative_least_squares, shapes
from saekit.planning.rates import Network, PassCost, Rates
from saekit.planning.speed import StepWork, step_time

RATES = Rates(
    measured="2026-01-01",
    matmul={"fp32": 1e9, "int8": 4e9},
    bandwidth=1e9,
    block={"fp32": 1e-8},
    passes={"cpu int8": PassCost(score=2e-9, term=3e-9, weight=5e-9, call=0.001)},
    update={"adam": 2e-9, "muon": 2e-9},
    network={2: Network(all_reduce=1e6, point_to_point=2e6)},
)
WORK = StepWork(
    tokens=100,
    micro_batches=1,
    chunks=1,
    trained=100,
    layers=3,
    d_in=10,
    num_latents=1000,
    k=4,
    lm_operations=5000,
    lm_blocks=6,
    lm_width=10,
    lm_type="fp32",
    kernels="cpu",
    select_type="int8",
    optimizer="adam",
    params_held=21010,
    sent=0,
    ranks=1,
    sharing=1,
    whole_layers_travel=False,
)
DENSE = 2 * 100 * 1000 * 10 / 4e9
SCORES, TERMS, WEIGHTS = 100 * 1000 * 2e-9, 100 * 4 * 10 * 3e-9, 10_000 * 5e-9


def test_one_rank():
    time = step_time(WORK, RATES)
    assert time.language_model == pytest.approx(100 * (5000 / 1e9 + 6 * 10 * 1e-8))
    assert time.passes == pytest.approx(3 * (DENSE + SCORES + TERMS + WEIGHTS + 0.001))
    assert time.update == pytest.approx(3 * 21010 * 2e-9)
    assert time.network == 0
    assert time.total == pytest.approx(0.00056 + 0.005286 + 0.00012606)


def test_a_transcoders_decoder_is_as_wide_as_what_it_writes():
    time = step_time(replace(WORK, d_out=30), RATES)
    assert time.passes == pytest.approx(3 * (DENSE + SCORES + 2 * (TERMS + WEIGHTS) + 0.001))


def test_chunks_and_micro_batches_add_gradients_to_gradients():
    time = step_time(replace(WORK, micro_batches=2, chunks=4), RATES)
    added = 2 * 10_000 * 3 * 4 / 1e9  # two matrices, read twice and written once
    one = DENSE + SCORES + TERMS + 4 * (WEIGHTS + 0.001)
    assert time.passes == pytest.approx(3 * (2 * one + 7 * added))
    assert time.update == pytest.approx(step_time(WORK, RATES).update)


def test_ranks_that_share_a_cpu_take_turns_and_talk():
    alone = step_time(WORK, RATES)
    time = step_time(replace(WORK, ranks=2, sharing=2, sent=10_000), RATES)
    assert time.language_model == pytest.approx(2 * alone.language_model)
    assert time.passes == pytest.approx(2 * alone.passes)
    assert time.network == pytest.approx(0.01)
    assert step_time(replace(WORK, ranks=2, sent=10_000, whole_layers_travel=True), RATES).network == 0.005


def test_muon_costs_more_where_it_is_wider():
    half = step_time(replace(WORK, optimizer="muon"), RATES).update
    assert half == pytest.approx(3 * 21010 * 2e-9 * 10 / 512)


@pytest.mark.parametrize(
    "unmeasured", [{"ranks": 4}, {"lm_type": "bf16"}, {"select_type": "fp32"}, {"kernels": "eager"}, {"optimizer": "?"}]
)
def test_what_was_not_measured_is_not_guessed(unmeasured):
    assert step_time(replace(WORK, **unmeasured), RATES) is None


def test_the_fit_finds_what_passes_were_made_of():
    wanted = [2e-9, 0.0, 3e-9, 1e-3]
    rows = [[N * M, N * k * D, M * D, 1.0] for N, D, M, k in shapes(1)]
    made = [sum(each * cost for each, cost in zip(row, wanted, strict=True)) for row in rows]
    assert nonnegative_least_squares(rows, made) == pytest.approx(wanted, rel=1e-6, abs=1e-15)


def test_nothing_takes_less_than_no_time():
    assert nonnegative_least_squares([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], [3.0, 2.0, 1.0]) == pytest.approx([2.0, 0.0])


@pytest.fixture
def cfg(model_dir):
    options = {"num_latents": 1024, "k": 4, "ctx_len": 32, "dtype": "float32", "select_dtype": "int8", "kernels": "cpu"}
    return RunConfig.from_flat({"model": str(model_dir), "dataset": "", **options})


def test_the_fastest_that_fits_is_recommended_where_speeds_are_known(cfg):
    machine = Machine("cpu", 2, 2**34, "CPU")
    assert make_plan(cfg, machine).recommended.placement == "layer-map"  # least traffic
    slow = replace(RATES, network={2: Network(all_reduce=1e12, point_to_point=1.0)})
    plan = make_plan(cfg, replace(machine, rates=slow))
    assert plan.recommended.placement == "zero3"  # the others' activations or whole updates take longer
    for choice in plan.choices:
        assert choice.tokens_per_second == pytest.approx(2 * 8 * 32 / choice.time.total)


def test_a_described_machine_has_no_speed(cfg):
    from saekit.planning import describe

    on_gpus = replace(cfg, train=replace(cfg.train, select_dtype="bf16"))
    assert all(choice.time is None for choice in make_plan(on_gpus, describe(2, "8GiB")).choices)
