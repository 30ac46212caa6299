"""Evaluations during training on several ranks: they find what one rank finds, and training does not notice them."""

import pytest

from saekit.runs.metrics import EVALUATION, read_metrics
from tests.analysis.test_ranks import numbers
from tests.placement.conftest import CTX_LEN, GLOBAL_BATCH
from tests.placement.test_equivalence import assert_same_run
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

pytestmark = pytest.mark.slow
SHORT = ["--max-tokens", 6 * GLOBAL_BATCH * CTX_LEN]
EVALUATED = [*SHORT, "--eval-every", 3, "--eval-tokens", 5 * CTX_LEN]


def evaluations_of(run):
    records = read_metrics(run / "metrics.jsonl", EVALUATION)
    return [{key: value for key, value in record.items() if key in ("step", "evaluation")} for record in records]


def assert_same_evaluations(found, expected):
    ours, theirs = evaluations_of(found), evaluations_of(expected)
    assert [record["step"] for record in ours] == [3, 6]
    for one, other in zip(ours, theirs, strict=True):
        assert numbers(one).keys() == numbers(other).keys()
        for path, value in numbers(other).items():
            expected = pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
            assert numbers(one)[path] == expected, path


@pytest.mark.parametrize("placement", ["ddp", "layer-map", "zero3"])
def test_ranks_evaluate_alike_and_training_does_not_notice(train, gpt2_dir, placement):
    """Cut into six chunks, a batch is one sequence, and the second rank has one batch less than the first."""
    options = ["--placement", placement, "--micro-acc-steps", 6]
    found = train(gpt2_dir, *options, *EVALUATED, ranks=2, devices=True)
    without = train(gpt2_dir, *options, *SHORT, ranks=2)
    assert_same_tensors(tensors_of(found / "latest"), tensors_of(without / "latest"))
    assert metrics_of(found) == metrics_of(without)
    assert_same_evaluations(found, train(gpt2_dir, *EVALUATED))


@pytest.mark.parametrize("placement", ["layer-map", "zero3"])
def test_the_average_is_evaluated_and_left_as_it_was(train, gpt2_dir, placement):
    signum = [*EVALUATED, "--optimizer", "signum"]
    found, expected = train(gpt2_dir, "--placement", placement, *signum, ranks=2), train(gpt2_dir, *signum)
    assert_same_evaluations(found, expected)
    assert_same_run(found, expected, steps=6)


@pytest.mark.parametrize(
    ("placement", "coders"),
    [("layer-map", ["--transcode", "--skip-connection"]), ("zero3", ["--crosscode", "resid"]), ("zero3", [])],
)
def test_thresholds_limits_and_frames_are_lent_with_the_coder(train, gpt2_dir, placement, coders):
    batch_topk = [*EVALUATED, *coders, "--activation", "batchtopk", "--max-norm-multiple", 1]
    found, expected = train(gpt2_dir, "--placement", placement, *batch_topk, ranks=2), train(gpt2_dir, *batch_topk)
    assert_same_evaluations(found, expected)
    assert_same_run(found, expected, steps=6)


def test_a_rank_without_layers_and_without_sequences(train, gpt2_dir):
    few = [*SHORT, "--eval-every", 3, "--eval-tokens", 2 * CTX_LEN]
    found = train(gpt2_dir, "--placement", "layer-map", *few, ranks=4)
    assert_same_evaluations(found, train(gpt2_dir, *few))


def test_a_sharded_language_model_is_reconstructed_only(train, gpt2_dir):
    options = ["--placement", "zero3", "--shard-lm"]
    found = train(gpt2_dir, *options, *EVALUATED, ranks=2)
    without = train(gpt2_dir, *options, *SHORT, ranks=2)
    assert_same_tensors(tensors_of(found / "latest"), tensors_of(without / "latest"))
    assert "none: --shard-lm loads the language model without its head" in (found / "stderr.txt").read_text()
    for one, other in zip(evaluations_of(found), evaluations_of(train(gpt2_dir, *EVALUATED)), strict=True):
        assert one["evaluation"]["together"] is None
        for layer, expected in zip(one["evaluation"]["layers"], other["evaluation"]["layers"], strict=True):
            assert layer["grafted"] is None
            assert layer["reconstruction"]["fvu"] == pytest.approx(expected["reconstruction"]["fvu"])
