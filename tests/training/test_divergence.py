"""SAEs that get worse than they were: said in reports and at the end of the run."""

import shutil

import pytest

from saekit.report import LayerStats, Lowest
from saekit.training.reports import _diverged
from saekit.training.state import RunState
from saekit.units import decimal
from tests.training.conftest import Recorder

TOO_HIGH = {"lr": 1.0, "lr_warmup_steps": 0}


def warnings_of(recorder):
    return [said for said in recorder.said if said.startswith("Warning")]


def test_a_diverged_sae_is_named_with_its_fvu_then_and_now(make_trainer):
    recorder = Recorder()
    make_trainer(reporter=recorder, **TOO_HIGH).fit()
    *_, last = recorder.steps
    (warning,) = warnings_of(recorder)
    assert set(last.diverged) == set(last.layers)
    assert warning.startswith("Warning: 3 of 3 SAEs have an FVU above 1 (worse than ")
    assert warning.endswith("try a smaller --lr or more --lr-warmup-steps")
    for name, lowest in last.diverged.items():
        history = [stats.layers[name].fvu for stats in recorder.steps]
        assert lowest == Lowest(min(history), 1 + history.index(min(history)))
        assert lowest.fvu < 1 < history[-1]
        assert f"{name} {lowest.fvu:.4f} at step {lowest.step}, {decimal(history[-1])} at the end" in warning


def test_a_run_that_learns_says_nothing_of_it(make_trainer):
    recorder = Recorder()
    make_trainer(reporter=recorder).fit()
    assert not any(stats.diverged for stats in recorder.steps)
    assert warnings_of(recorder) == []


def test_a_resumed_run_remembers_how_good_it_was(make_trainer, tmp_path):
    first, again = Recorder(), Recorder()
    make_trainer(reporter=first, save_every=6, keep_last=2, **TOO_HIGH).fit()
    shutil.rmtree(tmp_path / "run" / "step_00000007")
    make_trainer(reporter=again, save_every=6, keep_last=2, resume=True, **TOO_HIGH).fit()
    assert len(again.steps) == 1
    assert warnings_of(again) == warnings_of(first) != []


def test_the_only_report_of_a_short_run_is_enough(make_trainer):
    recorder = Recorder()
    make_trainer(reporter=recorder, log_every=100, **TOO_HIGH).fit()
    (only,) = recorder.steps
    assert list(only.diverged.values()) == [None] * 3
    assert f"layers.0 {decimal(only.layers['layers.0'].fvu)} at the end" in warnings_of(recorder)[0]


NAN = float("nan")


@pytest.mark.parametrize(
    ("fvu", "loss", "before", "last", "expected"),
    [
        (1.2, 0.9, 0.4, False, True),
        (1.2, 0.9, 1.1, False, True),
        (1.2, 0.9, 1.3, True, False),  # above 1, but it gets better
        (0.9, 0.9, 0.4, True, False),  # worse, but better than the mean
        (1.2, 0.9, None, False, False),
        (1.2, 0.9, None, True, True),
        (0.9, 0.9, None, True, False),
        (NAN, 0.9, 0.4, True, True),  # no token of it was counted
        (NAN, NAN, 0.4, True, False),  # every step was skipped
    ],
)
def test_which_layers_have_diverged(fvu, loss, before, last, expected):
    layer = LayerStats(fvu=fvu, l0=4, dead=0, num_latents=64, loss=loss, auxk_loss=0)
    lowest = None if before is None else Lowest(before, 3)
    run = RunState(step=9, lowest={} if lowest is None else {"layers.0": lowest})
    assert _diverged(run, {"layers.0": layer}, last=last) == ({"layers.0": lowest} if expected else {})
