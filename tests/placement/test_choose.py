import pytest

from saekit.errors import UserError
from saekit.placement.choose import choose, connect

TORCHRUN = {"LOCAL_RANK": "0", "ROLE_NAME": "default"}


@pytest.mark.parametrize(
    ("asked", "environment", "name"),
    [
        ("auto", {}, "single"),
        ("auto", TORCHRUN, "ddp"),
        ("auto", {**TORCHRUN, "ROLE_NAME": "layer-map"}, "layer-map"),
        ("ddp", TORCHRUN, "ddp"),
        ("layer-map", TORCHRUN, "layer-map"),
        ("layer-map", {**TORCHRUN, "ROLE_NAME": "layer-map"}, "layer-map"),
    ],
)
def test_what_was_asked_for_and_how_it_was_launched(asked, environment, name):
    assert choose(asked, environment) == name


@pytest.mark.parametrize(
    ("asked", "environment", "parts"),
    [
        ("ddp", {}, ["--placement ddp", "one process"]),
        ("layer-map", {}, ["--placement layer-map", "one process"]),
        ("ddp", {**TORCHRUN, "ROLE_NAME": "layer-map"}, ["--placement ddp", "role: layer-map"]),
        ("auto", {**TORCHRUN, "ACCELERATE_USE_DEEPSPEED": "true"}, ["--placement auto", "DeepSpeed"]),
        ("ddp", {**TORCHRUN, "ACCELERATE_USE_FSDP": "true"}, ["--placement ddp", "FSDP"]),
    ],
)
def test_contradictions_name_both_sides(asked, environment, parts):
    with pytest.raises(UserError) as refused:
        choose(asked, environment)
    assert all(part in str(refused.value) for part in parts)


def test_an_unknown_placement_is_not_taken_for_another():
    with pytest.raises(UserError, match="zero3: there is none"):
        connect("zero3")
