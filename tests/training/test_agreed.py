"""What `auto` comes to: the same on all ranks, measured, and kept for as long as a run goes on."""

import json

import pytest
import torch

from saekit import TrainConfig
from saekit.config import RunConfig
from saekit.sae.kernels import choose_kernels, fastest
from saekit.sae.kernels.fastest import Work
from saekit.training import agreed, live

CPU = torch.device("cpu")
WORK = Work(tokens=4096, d_in=512, num_latents=16384, k=32)


class Ranks:
    """This rank, and another that answers what it is told to, in the order of the questions."""

    device, rank = CPU, 0

    def __init__(self, *answers):
        self.answers = list(answers)

    def gather(self, value):
        return [value, self.answers.pop(0)]


@pytest.fixture
def measured(monkeypatch):
    """Have types take the seconds that are said, and count the measurements."""
    monkeypatch.setattr(agreed, "types", lambda *_: ("fp32", "bf16", "int8"))
    asked = []

    def say(**seconds):
        monkeypatch.setattr(agreed, "seconds_by_type", lambda *each: asked.append(each) or seconds)
        return asked

    return say


def kernels_of(ranks, tmp_path, **options):
    return agreed.agreed_kernels(TrainConfig(**{"kernels": "cpu", **options}), [WORK], ranks, tmp_path)


def test_the_slowest_rank_decides(measured, tmp_path):
    measured(fp32=3.0, bf16=2.0, int8=1.0)
    other = {"fp32": 3.0, "bf16": 2.0, "int8": 9.0}
    assert kernels_of(Ranks({}, False, other), tmp_path).select_dtype == torch.bfloat16
    del other["bf16"]  # that CPU has no such instructions
    assert kernels_of(Ranks({}, False, other), tmp_path).select_dtype is None


def test_nothing_is_measured_for_what_was_asked_for(measured, tmp_path):
    asked = measured(fp32=3.0, bf16=2.0, int8=1.0)
    assert kernels_of(Ranks({}), tmp_path, select_dtype="bf16").select_dtype == torch.bfloat16
    assert kernels_of(Ranks({}), tmp_path, kernels="eager").name == "eager"
    assert not asked


def test_the_largest_unit_decides(measured, tmp_path):
    asked = measured(fp32=3.0, bf16=2.0, int8=1.0)
    small, large = WORK._replace(d_in=128), WORK._replace(d_in=1024)
    ranks = Ranks({}, False, {"fp32": 1.0})
    agreed.agreed_kernels(TrainConfig(kernels="cpu"), [small, large, small], ranks, tmp_path)
    assert asked == [("cpu", large)]


def test_ranks_that_guess_differently_select_exactly(monkeypatch, measured, tmp_path):
    measured()
    tiny = [WORK._replace(tokens=1)]
    for other, expected in ("int8", torch.int8), ("bf16", None):
        monkeypatch.setattr(agreed, "likely_type", lambda _: "int8")
        found = agreed.agreed_kernels(TrainConfig(kernels="cpu"), tiny, Ranks({}, False, other), tmp_path)
        assert found.select_dtype == expected


@pytest.mark.parametrize("stays", [True, False])
def test_a_resumed_run_keeps_what_it_began_with(make_trainer, monkeypatch, tmp_path, stays):
    """And an evaluation of the same cache by a new run does not, unless the CPU lacks the instructions now."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fastest, "LEAST_WORK", 0)
    monkeypatch.setattr(fastest, "low_precision_pays", lambda *_: True)
    for name in ("fastest", "agreed"):
        module = fastest if name == "fastest" else agreed
        monkeypatch.setattr(module, "types", lambda *_: ("fp32", "int8"))
    monkeypatch.setattr(fastest, "measure", lambda *_: {"fp32": 2.0, "int8": 1.0})

    def selects(folder):
        return json.loads((folder / "checkpoint.json").read_text())["resolved"]["select_dtype"]

    assert selects(make_trainer("run").fit()) == "int8"
    fastest.cache_file().unlink()
    monkeypatch.setattr(fastest, "measure", lambda *_: {"fp32": 1.0, "int8": 2.0})
    if not stays:
        monkeypatch.setattr(agreed, "types", lambda *_: ("fp32", "bf16"))
    assert make_trainer("run", resume=True).plan.select_dtype == ("int8" if stays else "fp32")
    assert make_trainer("other").plan.select_dtype == "fp32"


def test_a_resumed_run_keeps_its_kernels(make_trainer, tmp_path):
    make_trainer("run", kernels="cpu").fit()
    assert make_trainer("run", resume=True, kernels="auto").plan.kernels.name == "cpu"
    assert make_trainer("other").plan.kernels.name == choose_kernels("auto", "fp32", CPU).name


def test_a_damaged_checkpoint_is_reported_by_whoever_restores_it(make_trainer):
    index = make_trainer("run").fit() / "checkpoint.json"
    index.write_text("{")
    assert make_trainer("run", resume=True).plan.kernels.name == choose_kernels("auto", "fp32", CPU).name


@pytest.mark.parametrize(("loader", "options"), [("load_model", {}), ("load_with_head", {"eval_every": 2})])
def test_the_language_model_has_one_type_on_all_ranks(monkeypatch, loader, options):
    """Under layer-map they exchange its activations."""

    class Loaded(Exception):  # noqa: N818
        """With the configuration."""

    def load(cfg, *_, **__):
        raise Loaded(cfg.dtype)

    monkeypatch.setattr("saekit.activations.on_device.has_fast_bf16", lambda _: True)
    monkeypatch.setattr(live, loader, load)
    cfg = RunConfig.from_flat({"model": "model", "dataset": "data", **options})
    for other, expected in ("bfloat16", "bfloat16"), ("float32", "float32"):
        with pytest.raises(Loaded, match=expected):
            live._load(cfg.model, cfg.train, Ranks(other), None, 1)
