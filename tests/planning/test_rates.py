"""`saekit plan --calibrate`: what it finds is kept, reported, used again and replaced."""

import json

import pytest

from saekit.errors import UserError
from saekit.planning import calibration
from saekit.planning.rates import Network, PassCost, Rates, cache_file, keep_rates, read_rates
from tests.cli.conftest import saekit  # noqa: F401  # a fixture

RATES = Rates(
    measured="2026-01-01",
    matmul={"fp32": 1e9},
    bandwidth=1e9,
    block={"fp32": 0.0},
    passes={"cpu fp32": PassCost(0.0, 1e-9, 0.0, 0.0)},
    update={"adam": 1e-9},
    network={2: Network(1e6, 2e6)},
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "saekit" / "rates.json"


def test_rates_are_kept_by_device(cache):
    assert read_rates("one") == (None, None)
    assert keep_rates({"one": RATES}) == cache == cache_file()
    keep_rates({"two": RATES})
    assert read_rates("one") == (RATES, None)
    assert read_rates("two") == (RATES, None)
    assert read_rates("three") == (None, None)
    assert [file.name for file in cache.parent.iterdir()] == ["rates.json"]


def test_measuring_again_replaces_and_keeps_other_numbers_of_ranks():
    from dataclasses import replace

    keep_rates({"one": RATES})
    keep_rates({"one": replace(RATES, bandwidth=5.0, network={4: Network(3.0, 4.0)})})
    found, _ = read_rates("one")
    assert found.bandwidth == 5.0
    assert found.network == {2: Network(1e6, 2e6), 4: Network(3.0, 4.0)}


@pytest.mark.parametrize(
    "text", ["", "{", '{"version": 2, "devices": {}}', '{"version": 1, "devices": {"one": {"bandwidth": -1}}}']
)
def test_a_file_that_cannot_be_read_is_said_and_replaced(cache, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text, encoding="utf-8")
    rates, note = read_rates("one")
    assert rates is None
    assert note.startswith(f"{cache} cannot be read (")
    keep_rates({"one": RATES})
    assert read_rates("one") == (RATES, None)


def test_a_file_that_cannot_be_written_is_an_error_of_one_line(cache):
    cache.parent.parent.write_text("in the way", encoding="utf-8")
    with pytest.raises(UserError, match=r"rates.json cannot be written .*: set XDG_CACHE_HOME to another folder"):
        keep_rates({"one": RATES})


@pytest.mark.slow
def test_calibrate_is_kept_reported_and_used(saekit, model_dir, cache, monkeypatch):  # noqa: F811
    small = ["--num-latents", 256, "--k", 4, "--ctx-len", 32]
    before = saekit("plan", model_dir, *small)
    assert "Tokens/s are unknown until saekit plan --calibrate" in before.out
    monkeypatch.setattr(
        calibration,
        "shapes",
        lambda _: [(8, 8, 64, 1), (64, 8, 64, 4), (8, 8, 512, 4), (8, 64, 64, 1), (64, 64, 64, 4)],
    )
    monkeypatch.setattr(calibration, "LATENTS", 256)
    fastest = calibration.fastest
    monkeypatch.setattr(calibration, "fastest", lambda work, device, *_: fastest(work, device, 1))
    done = saekit("plan", "--calibrate")
    assert done.code == 0, done.err
    assert "matmul fp32" in done.out
    assert "all-reduce, 2 ranks" in done.out
    assert f"Saved to {cache}" in done.out.replace("\n", "")
    (rates,) = json.loads(cache.read_text(encoding="utf-8"))["devices"].values()
    assert min(*rates["matmul"].values(), rates["bandwidth"], *rates["update"].values()) > 0
    assert min(*rates["network"]["2"].values()) > 0
    assert {"adam", "adam bf16", "signum", "muon"} <= rates["update"].keys()

    planned = saekit("plan", model_dir, *small, "--detect", "--num-processes", 2, "--json")
    placements = json.loads(planned.out)["placements"]
    assert all(each["tokens_per_second"] > 0 for each in placements.values())
    assert "tokens/s, expected" in saekit("plan", model_dir, *small).out
    three = saekit("plan", model_dir, *small, "--num-processes", 3)
    assert "Tokens/s are unknown until saekit plan --calibrate" in three.out  # a network between three was not measured
    described = saekit("plan", model_dir, *small, "--gpus", 2, "--gpu-memory", "8GiB")
    assert "tokens/s, expected" not in described.out
    assert "Tokens/s are known for this machine only" in described.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--detect"], "--detect plans for this machine and --gpus 8 for another"),
        (["--calibrate"], "--calibrate measures this machine, and --gpus 8 describes another"),
    ],
)
def test_one_machine_at_a_time(saekit, model_dir, options, message):  # noqa: F811
    done = saekit("plan", model_dir, "--gpus", 8, "--gpu-memory", "8GiB", *options)
    assert done.code == 2
    assert message in done.err
