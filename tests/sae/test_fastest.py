"""In which type a CPU selects: timed with the real operation, remembered, and forgotten where it does not fit."""

import json

import pytest
import torch

from saekit.sae.kernels import fastest
from saekit.sae.kernels.fastest import Work

WORK = Work(tokens=4096, d_in=512, num_latents=16384, k=32)
ONCE, PER_TOKEN = {"fp32": 0.0, "bf16": 0.5, "int8": 4.0}, {"fp32": 0.01, "bf16": 0.004, "int8": 0.002}
"""Seconds of an encoder on a clock of our own: int8 is best for many tokens, and worst for few."""


class Clock:
    """Stands still but for encoders, which take the time that is said above, and half as much more every other time."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def perf_counter(self):
        return self.now

    def choose(self, backend, name, device):
        def encode_topk(x_ND, W_MD, b_M, k):
            assert x_ND.shape[1] == W_MD.shape[1] == WORK.d_in
            self.calls.append((name, len(x_ND)))
            slow = 1.5 if len(self.calls) % 2 else 1.0
            self.now += slow * (ONCE[name] + PER_TOKEN[name] * len(x_ND))

        return type("Kernels", (), {"encode_topk": staticmethod(encode_topk)})


@pytest.fixture
def clock(monkeypatch, tmp_path):
    found = Clock()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fastest, "time", found)
    monkeypatch.setattr(fastest, "choose_kernels", found.choose)
    monkeypatch.setattr(fastest, "types", lambda *_: ("fp32", "bf16", "int8"))
    return found


class TestMeasuring:
    def test_what_comes_once_is_not_counted_for_each_token(self, clock):
        seconds = fastest.measure("cpu", WORK)
        assert seconds == pytest.approx({name: ONCE[name] + 4096 * PER_TOKEN[name] for name in ONCE}, rel=0.6)
        assert fastest.fastest(seconds) == "int8"
        assert fastest.fastest(fastest.measure("cpu", WORK._replace(tokens=200))) == "bf16"

    def test_what_is_hopeless_is_timed_once(self, clock, monkeypatch):
        monkeypatch.setitem(PER_TOKEN, "bf16", 1.0)
        seconds = fastest.measure("cpu", WORK)
        assert len([each for each in clock.calls if each[0] == "bf16"]) == 2
        assert fastest.fastest(seconds) == "int8"

    def test_of_equals_the_exact_one(self):
        assert fastest.fastest({"fp32": 1.0, "bf16": 1.0}) == "fp32"

    @pytest.mark.parametrize("backend", ["cpu", "native"])
    def test_the_real_operation(self, backend):
        if backend == "native" and fastest.choose_kernels("auto", "fp32", torch.device("cpu")).name != "native":
            pytest.skip("no native kernels here")
        seconds = fastest.measure(backend, Work(tokens=100, d_in=32, num_latents=2048, k=4))
        assert set(seconds) == set(fastest.types())
        assert all(each > 0 for each in seconds.values())


class TestTheCache:
    def test_is_asked_first(self, clock, monkeypatch):
        first = fastest.seconds_by_type("cpu", WORK)
        calls = len(clock.calls)
        assert fastest.seconds_by_type("cpu", WORK) == first
        assert len(clock.calls) == calls
        for other in ("native", WORK), ("cpu", WORK._replace(k=33)):
            fastest.seconds_by_type(*other)
            assert len(clock.calls) > calls
            calls = len(clock.calls)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        fastest.seconds_by_type("cpu", WORK)
        assert len(clock.calls) > calls

    def test_knows_a_coder_by_other_numbers_of_tokens(self, clock):
        found = fastest.seconds_by_type("cpu", WORK)
        assert fastest.remembered("cpu", WORK._replace(tokens=17)) == found
        assert fastest.remembered("cpu", WORK._replace(num_latents=1638)) is None
        assert fastest.remembered("native", WORK) is None

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}', '{"x": {"y": 1}}', '{"x": {"y": {"fp32": "z"}}}'])
    def test_is_replaced_where_it_cannot_be_read(self, clock, text):
        fastest.cache_file().write_text(text)
        found = fastest.seconds_by_type("cpu", WORK)
        (kept,) = json.loads(fastest.cache_file().read_text()).values()
        assert kept == {WORK.key: found}

    def test_without_a_place_every_process_measures(self, clock, tmp_path, monkeypatch):
        (tmp_path / "saekit").mkdir()
        monkeypatch.setattr(fastest, "cache_folder", lambda: tmp_path / "gone")
        assert fastest.fastest(fastest.seconds_by_type("cpu", WORK)) == "int8"
        assert fastest.known("cpu") == {}

    def test_of_a_cpu_with_other_instructions_is_not_used(self, clock, monkeypatch):
        fastest.seconds_by_type("cpu", WORK)
        monkeypatch.setattr(fastest, "types", lambda *_: ("fp32", "bf16"))
        assert fastest.known("cpu") == {}


@pytest.mark.parametrize(
    ("work", "measured"),
    [
        (WORK, True),
        (WORK._replace(tokens=16), False),  # a few milliseconds in any type
        (WORK._replace(k=2000), False),  # too many candidates for low precision to pay
    ],
)
def test_what_is_worth_measuring(work, measured):
    assert work.is_measured == measured


def test_on_a_gpu_nothing_else_than_it_multiplies(monkeypatch):
    for fast, expected in (True, ("fp32", "bf16")), (False, ("fp32",)):
        monkeypatch.setattr(fastest, "has_fast_bf16", lambda device, fast=fast: fast)
        assert fastest.types(torch.device("cuda")) == expected
