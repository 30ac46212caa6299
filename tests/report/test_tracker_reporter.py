from __future__ import annotations

import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker

from saekit.errors import UserError
from saekit.report.trackers import TrackerReporter, check_tracker, evaluation_metrics, flat_config, metrics


class Recorder(GeneralTracker):
    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.config, self.logged, self.finished = None, [], 0

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def recorder():
    yield Recorder()
    AcceleratorState._reset_state(reset_partial_state=True)


def test_through_accelerate(recorder, make_info, make_stats, make_evaluation, tmp_path):
    reporter = TrackerReporter(Accelerator(cpu=True, log_with=recorder), "saekit")
    reporter.status("nothing")
    reporter.start(make_info())
    reporter.step(make_stats(5))
    reporter.evaluated(make_evaluation(5))
    reporter.saved(tmp_path, 5)
    reporter.finish()
    reporter.finish()
    assert recorder.config == {
        "lr": "None",
        "sae.k": 32,
        "sae.multi_topk": False,
        "layers": "0, 1",
        "dataset": "wikitext",
    }
    assert recorder.logged == [(5, metrics(make_stats(5))), (5, evaluation_metrics(make_evaluation(5)))]
    assert recorder.finished == 1


def test_finish_without_start(recorder):
    TrackerReporter(Accelerator(cpu=True, log_with=recorder), "saekit").finish()
    assert recorder.finished == 0


def test_metric_names(make_stats):
    flat = metrics(make_stats(5))
    assert flat["fvu/layers.1"] == 0.51
    assert flat["dead_pct/layers.1"] == pytest.approx(100 * 41 / 4096)
    assert flat["fvu_mean"] == pytest.approx(0.505)
    assert flat["tokens_per_second"] == 12_345.6
    assert flat["too_long/layers.0"] == 0.004
    assert "multi_topk_fvu/layers.1" not in flat
    assert all(isinstance(value, (int, float)) for value in flat.values())


def test_flat_config_has_scalars_and_strings_only(tmp_path):
    flat = flat_config({"a": {"b": {"c": 1.5}}, "path": tmp_path, "none": None, "names": ("x", "y")})
    assert flat == {"a.b.c": 1.5, "path": str(tmp_path), "none": "None", "names": "x, y"}


def test_names_of_evaluations(make_evaluation):
    flat = evaluation_metrics(make_evaluation(5))
    assert flat["eval/fvu/layers.1"] == 0.26
    assert flat["eval/dead_pct/layers.0"] == 25
    assert flat["eval/ce_recovered/layers.1"] == pytest.approx(0.8)
    assert flat["eval/ce_recovered/all"] == 0.5
    assert flat["eval/ce_clean"] == 1.5
    bare = evaluation_metrics(make_evaluation(5, head=False))
    assert {name.split("/")[1] for name in bare} == {"fvu", "explained_variance", "cosine", "l0", "dead_pct"}


def wandb_of(mode, logged_in, asks):
    """What saekit uses of the package, with or without the option not to ask for a key."""
    settings = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    if asks:
        return SimpleNamespace(setup=lambda: settings, login=lambda prompt=True, verify=True: not prompt and logged_in)
    api = SimpleNamespace(api_key="key" if logged_in else None)
    return SimpleNamespace(setup=lambda: settings, login=lambda key=None: None, api=api)


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize(("mode", "logged_in"), [("online", False), ("online", True), ("offline", False)])
def test_nobody_is_logged_in(monkeypatch, mode, logged_in, asks):
    """Told before anything is tokenized; without a network the login cannot be tried, nor need it be."""
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", wandb_of(mode, logged_in, asks))
    if mode == "offline" or logged_in:
        check_tracker("wandb")
    else:
        with pytest.raises(UserError, match="--log-with wandb: you are not logged in: run `wandb login`"):
            check_tracker("wandb")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_the_real_wandb(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="you are not logged in"):
        check_tracker("wandb")
