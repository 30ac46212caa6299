"""Planning a run on a cache: no language model, but two steps' activations that are read ahead."""

import json

import pytest

from tests.cache.test_cache import BATCH, T, bin_file, make  # noqa: F401  # fixtures
from tests.cli.conftest import saekit  # noqa: F401  # a fixture

SIZES = ("--num-latents", "64", "--k", "4", "--batch-size", str(BATCH), "--kernels", "cpu", "--select-dtype", "fp32")
GPU = ("--gpus", "1", "--gpu-memory", "1GiB")
STEP = BATCH * T * 4 * (16 + 16 + 16)
"""Bytes of the activations of a step."""


@pytest.fixture
def plan(make, saekit, model_dir):  # noqa: F811
    folder = make()

    def call(*options, cached=True):
        command = ("--activations", folder) if cached else (model_dir, "--hookpoints", "layers.0,layers.1.mlp:in")
        done = saekit("plan", *command, "--json", *SIZES[:6], *options)
        assert done.code == 0, done.err
        return json.loads(done.out)["placements"]["single"]

    return call


def test_a_cached_run_has_no_language_model_and_reads_ahead(plan):
    found = plan(*GPU)
    assert found["parts"]["language_model"] == 0
    assert found["host"] == 2 * STEP
    assert plan(*GPU, "--mix", 3, "--mix-in", "device")["host"] == 0
    assert plan(*GPU, "--layers", 0)["host"] == 2 * STEP / 3
    on_cpu = plan()
    assert on_cpu["host"] == 0
    assert on_cpu["parts"]["activations"] >= 2 * STEP


def test_the_whole_language_model_is_there_for_evaluations(plan):
    whole = plan(*GPU, "--eval-every", 5, "--dtype", "float32", cached=False)
    assert plan(*GPU, "--eval-every", 5)["parts"]["language_model"] == whole["parts"]["language_model"] > 0


def test_a_dry_run_needs_no_names(make, saekit, model_dir):  # noqa: F811
    folder = make()
    done = saekit("train", "--activations", folder, *SIZES, "--dry-run")
    assert done.code == 0, done.err
    assert f"model: {model_dir}" in done.out
    refused = saekit("plan", "--activations", folder, *SIZES, "--ctx-len", 8)
    assert refused.code == 2
    assert "--ctx-len is 8 and the cache has 16" in refused.err
