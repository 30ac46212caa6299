import json
import subprocess
import sys

import pytest

from saekit import TrainConfig
from saekit.errors import UserError
from saekit.placement.choose import choose, connect, kind_of, launched_as
from saekit.placement.deepspeed import offload_devices

TORCHRUN = {"LOCAL_RANK": "0", "ROLE_NAME": "default"}
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}
DEEPSPEED = {**ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("asked", "environment", "name"),
    [
        ("auto", {}, "single"),
        ("auto", TORCHRUN, "ddp"),
        ("auto", {**TORCHRUN, "ROLE_NAME": "layer-map"}, "layer-map"),
        ("ddp", TORCHRUN, "ddp"),
        ("layer-map", TORCHRUN, "layer-map"),
        ("layer-map", {**TORCHRUN, "ROLE_NAME": "layer-map"}, "layer-map"),
        ("zero3", TORCHRUN, "zero3"),
        ("zero3", DEEPSPEED, "zero3"),
        ("auto", DEEPSPEED, "zero3"),
        ("single", {}, "single"),
        ("auto", {**TORCHRUN, "ROLE_NAME": "single"}, "ddp"),
    ],
)
def test_what_was_asked_for_and_how_it_was_launched(asked, environment, name):
    assert choose(asked, environment) == name


@pytest.mark.parametrize(
    ("asked", "environment", "parts"),
    [
        ("ddp", {}, ["--placement ddp", "several processes"]),
        ("layer-map", {}, ["--placement layer-map", "several processes"]),
        ("ddp", {**TORCHRUN, "ROLE_NAME": "layer-map"}, ["--placement ddp", "role: layer-map"]),
        ("zero3", {}, ["--placement zero3", "several processes"]),
        ("ddp", DEEPSPEED, ["--placement ddp", "DeepSpeed"]),
        ("layer-map", DEEPSPEED, ["--placement layer-map", "DeepSpeed"]),
        ("auto", {**DEEPSPEED, "ROLE_NAME": "layer-map"}, ["--placement layer-map", "DeepSpeed"]),
        ("zero3", {**TORCHRUN, "ROLE_NAME": "layer-map"}, ["--placement zero3", "role: layer-map"]),
        ("zero3", ACCELERATE, ["--placement zero3", "does not say DeepSpeed"]),
        ("ddp", {**TORCHRUN, "ACCELERATE_USE_FSDP": "true"}, ["--placement ddp", "FSDP", "ddp, layer-map, zero3"]),
        ("single", TORCHRUN, ["--placement single", "a launcher has started"]),
    ],
)
def test_contradictions_name_both_sides(asked, environment, parts):
    with pytest.raises(UserError) as refused:
        choose(asked, environment)
    assert all(part in str(refused.value) for part in parts)


def test_an_unknown_placement_is_not_taken_for_another():
    with pytest.raises(UserError, match="zero9: there is none"):
        connect("zero9")


def test_a_layer_map_for_one_process_is_refused():
    with pytest.raises(UserError, match="--layer-map 0:0 has no meaning under --placement single"):
        connect("auto", "0:0")


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("zero3", {"optimizer": "muon"}, "zero3 cannot train with --optimizer muon"),
        ("zero3", {"optimizer": "adam"}, None),
        ("ddp", {"optimizer": "muon"}, None),
        ("ddp", {"shard_lm": True}, "--shard-lm is not supported by --placement ddp"),
        ("single", {"shard_lm": True}, "--shard-lm is not supported by --placement single"),
        ("zero3", {"shard_lm": True}, None),
        ("ddp", {"layer_map": "0:0"}, "--layer-map 0:0 has no meaning under --placement ddp"),
        ("layer-map", {"layer_map": "0:0"}, None),
    ],
)
def test_placements_say_what_they_support(name, options, complaint):
    cfg = TrainConfig(**options)
    if complaint is None:
        assert kind_of(name).supports(cfg) is None
        kind_of(name).check(cfg)
    else:
        with pytest.raises(UserError, match=complaint):
            kind_of(name).check(cfg)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"distributed_type": "NO"}, None),
        ({"distributed_type": "DEEPSPEED"}, "zero3"),
        ({"distributed_type": "MULTI_GPU"}, "ddp"),
        ({"distributed_type": "MULTI_GPU", "mpirun_config": {"role": "layer-map"}}, "layer-map"),
        ({"distributed_type": "MULTI_GPU", "mpirun_config": {"role": "trainer"}}, "ddp"),
        ({"distributed_type": "MULTI_GPU", "mpirun_config": None}, "ddp"),
    ],
)
def test_what_a_launch_file_decides(said, name):
    assert launched_as(said) == name


def test_answers_need_no_library_but_torch():
    script = (
        "import sys; from saekit.placement.choose import kinds; "
        "assert [kind.name for kind in kinds(2)] == ['ddp', 'layer-map', 'zero3']; "
        "assert not {'deepspeed', 'accelerate', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "offload"),
    [
        ({}, ("none", "none")),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, ("cpu", "none")),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, ("none", "cpu")),
    ],
)
def test_the_launch_file_says_what_is_offloaded(environment, offload):
    found = offload_devices({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", **environment})
    assert (found["offload_optimizer"], found["offload_param"]) == offload


def test_deepspeeds_own_file_says_the_same(tmp_path):
    file = tmp_path / "zero.json"
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    file.write_text(json.dumps({"zero_optimization": zero}))
    assert offload_devices({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})["offload_optimizer"] == "cpu"
    file.write_text("{")
    with pytest.raises(UserError, match=r"zero\.json cannot be read"):
        offload_devices({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ZeRO stage 2, but saekit supports stage 3 only"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "offload_optimizer_device: nvme"),
    ],
)
def test_another_stage_or_a_disk_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        offload_devices(environment)
