"""Advice where a run does not fit: each advised option is real, and gives what was said of it."""

import json
import shlex

import pytest
from transformers import LlamaConfig

from saekit.planning import Offload
from tests.cli.conftest import saekit  # noqa: F401  # a fixture

GIB = 2**30
SHAPE = ("--num-latents", 16384, "--ctx-len", 256)


@pytest.fixture(scope="module")
def eight_layers(tmp_path_factory):
    """A folder with the config of a Llama of 8 layers and nothing else."""
    folder = tmp_path_factory.mktemp("eight-layers")
    LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        max_position_embeddings=2048,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers():
    """By options, so that no plan is made twice."""
    return {}


@pytest.fixture
def planned(saekit, eight_layers, answers):  # noqa: F811
    def call(*options):
        key = tuple(map(str, options))
        if key not in answers:
            done = saekit("plan", eight_layers, "--json", *SHAPE, *options)
            assert done.code == 0, done.err
            answers[key] = done.out
        return json.loads(answers[key])

    return call


def merged(options, advised):
    """The command's options with those advised in place of older ones of the same name."""
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    words = shlex.split(" ".join(advised))
    while words:
        name = words.pop(0)
        pairs[name] = words.pop(0) if words and not words[0].startswith("--") else None
    return [part for name, value in pairs.items() for part in (name, value) if part is not None]


@pytest.mark.parametrize(
    "options",
    [
        ("--gpus", 2, "--gpu-memory", "3.5GiB", "--batch-size", 32),
        ("--gpus", 1, "--gpu-memory", "3GiB", "--batch-size", 4),
        ("--gpus", 2, "--gpu-memory", "3GiB", "--placement", "zero3"),
        ("--gpus", 4, "--gpu-memory", "1.5GiB", "--layers", "1,3,5", "--optimizer", "signum"),
    ],
)
def test_what_is_advised_gives_what_was_said(planned, options):
    found = planned(*options)
    assert found["advice"]
    for advice in found["advice"]:
        again = planned(*merged(options, advice["options"]))
        placement = again["placements"][advice["placement"]]
        assert placement["total"] == advice["total"]
        assert placement["fits"] == advice["fits"]
        assert placement["host"] == advice["host"]
        assert len(again["layers"]) == advice["layers"]
        if "--placement" not in options:
            assert advice["total"] == min(
                each["total"] for each in again["placements"].values() if each["host"] == advice["host"]
            )


def test_the_least_degree_that_fits(planned):
    options = ("--gpus", 2, "--gpu-memory", "3.5GiB", "--batch-size", 32)
    advice = {each["options"][0]: each for each in planned(*options)["advice"]}
    (option,) = (name for name in advice if name.startswith("--layer-stride"))
    stride = int(option.split()[1])
    assert advice[option]["fits"]
    less = planned(*options, "--layer-stride", stride - 1)
    assert not any(each["fits"] for each in less["placements"].values())
    assert advice["--moments-dtype bf16"]["layers"] == 8


def test_changes_are_put_together_until_they_fit(planned):
    advice = planned("--gpus", 1, "--gpu-memory", "3GiB", "--batch-size", 4)["advice"]
    *single, together = advice
    assert all(len(each["options"]) == 1 for each in single)
    assert not any(each["fits"] for each in single if each["layers"] == 8)
    assert len(together["options"]) > 2
    assert together["fits"]


def test_a_placement_that_is_asked_for(planned):
    options = ("--gpus", 8, "--gpu-memory", "4GiB")
    free, asked = planned(*options), planned(*options, "--placement", "ddp")
    assert free["recommended"] == asked["recommended"] == "layer-map"
    assert not free["advice"]
    assert {each["placement"] for each in asked["advice"]} == {"ddp"}


def test_where_nothing_helps(saekit, eight_layers):  # noqa: F811
    done = saekit("plan", eight_layers, *SHAPE, "--gpus", 1, "--gpu-memory", "1GiB")
    assert "single does not fit" in done.out
    assert "what to change" in done.out
    assert "None of these changes makes it fit, not even all together." in done.out


def test_offloading_leaves_the_gpu_the_layer_at_work(planned):
    options = ("--gpus", 2, "--gpu-memory", "40GiB")
    here = planned(*options)["placements"]["zero3"]
    away = planned(*options, "--launch", "zero3-offload")["placements"]["zero3"]
    half = 8 * (2 * 16384 * 1024 + 16384 + 1024) / 2  # parameters of all layers on each of two ranks
    assert away["host"] == pytest.approx(half * (4 + 2 * 4 + 8))
    assert here["host"] == 0
    parts = away["parts"]
    assert parts["parameters"] == parts["gradients"] == parts["optimizer_state"] == 0
    assert here["total"] - away["total"] >= half * (4 + 8)


@pytest.mark.parametrize(
    ("name", "asked", "placement", "offload"),
    [
        ("zero3-offload", "auto", "zero3", Offload(True, True)),
        ("zero3", "auto", "zero3", Offload()),
        ("layer-map-cpu", "auto", "layer-map", Offload()),
        ("ddp", "auto", "ddp", Offload()),
        ("ddp", "layer-map", "layer-map", Offload()),
        ("cpu", "auto", None, Offload()),
    ],
)
def test_what_a_launch_file_decides(name, asked, placement, offload):
    from saekit.cli.launch import offload_of, placement_of

    assert placement_of(name, asked) == placement
    assert offload_of(name) == offload


def test_a_dry_run_that_does_not_fit_says_what_would(saekit, eight_layers, monkeypatch):  # noqa: F811
    monkeypatch.setattr("saekit.planning.machine.usable_memory", lambda: 8 * GIB)
    done = saekit("train", eight_layers, "data", *SHAPE, "--batch-size", 2, "--launch", "ddp-cpu", "--dry-run")
    assert done.code == 0, done.err
    assert "ddp does not fit: it lacks" in done.out
    assert "--moments-dtype bf16" in done.out
