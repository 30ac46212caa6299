"""DeepSpeed as zero3 needs it: its settings, from the launch file or because they are right, and its silence."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DeepSpeedPlugin
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

from saekit.errors import UserError
from saekit.placement.world import World, start_world

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEVICES = ("none", "cpu")
"""Where parameters and optimizer states may be offloaded to."""
OFFLOADED = {"offload_optimizer": "OPTIMIZER", "offload_param": "PARAM"}


def start_zero3() -> World:
    """Join the other ranks with a plugin for stage 3.

    Raises:
        UserError: If DeepSpeed is missing, or the launch file asks for another stage or another way of offloading.
    """
    silence()
    offload = offload_devices(os.environ)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"--placement zero3 needs DeepSpeed, which cannot be imported here ({error})") from error
    if not torch.cuda.is_available():
        # A shared-memory operation that would be compiled for a minute, with a compiler that need not be there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # How many CPUs there are to train on; without it `numactl` is started and asked, in every backward pass.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # accelerate refuses settings from two sides; what the launch file says is in ours by now.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    world = start_world(DeepSpeedPlugin(hf_ds_config=settings(offload)))
    unset_hf_deepspeed_config()  # else transformers would shard the language model as well
    return world


def load_sharded(load: Callable[[], PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """Return a language model that is cut among the ranks: each of its modules is gathered while it runs.

    Args:
        load: Loads it with transformers, which then keeps one shard only of each tensor that it reads.
        dtype: The type of its weights.
    """
    import deepspeed

    config = settings(offload_devices(os.environ))
    config |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    # Nobody changes its weights, so that biases and norms may stay whole.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 10_000
    told = HfDeepSpeedConfig(config)
    try:
        model = load()
    finally:
        del told
        unset_hf_deepspeed_config()
    deepspeed.initialize(model=model, config=config)  # its hooks, on the model's modules, are what is wanted
    return model


def settings(offload: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's configuration. What is not its default has a reason."""
    pins = torch.cuda.is_available()
    zero = {
        "stage": 3,
        # Small tensors too: those that persist would go stale, because the decoder is changed behind its back.
        "stage3_param_persistence_threshold": 0,
        # The default, 5e8 elements, is a buffer larger than most banks; no gradient waits for another one here.
        "reduce_bucket_size": 1_000_000,
        # Only stage 2 can overlap with an accumulation of our own.
        "overlap_comm": False,
        # Else `torch.nn.functional.linear` is replaced for the whole process, the language model included.
        "memory_efficient_linear": False,
        # Pinned, else the host waits for each copy between its memory and a GPU's.
        **{name: {"device": device, "pin_memory": pins} for name, device in offload.items() if device != "none"},
    }
    return {
        "zero_optimization": zero,
        "gradient_clipping": 0.0,  # else it clips at 1
        "managed_gradient_accumulation": False,  # a step ends when we say so: there is a backward pass per layer
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,  # it must be a number, and is not used
        "zero_force_ds_cpu_optimizer": False,  # torch's own Adam, offloaded or not
        "bf16": {"enabled": False},  # SAEs are trained in float32; the language model has its own type
        "fp16": {"enabled": False},
    }


def offload_devices(environment: Mapping[str, str]) -> dict[str, str]:
    """Return where the launch file wants `offload_optimizer` and `offload_param`: `none` or `cpu`.

    Raises:
        UserError: If it says another stage than 3, or offloading to a disk; or its own DeepSpeed file cannot be read.
    """
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    devices = {name: environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{key}_DEVICE") for name, key in OFFLOADED.items()}
    if path := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        try:
            zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
            stage = str(zero.get("stage", 0))
            devices = {name: zero.get(name, {}).get("device") for name in OFFLOADED}
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"the launch file's deepspeed_config_file {path} cannot be read ({error})") from None
    if stage != "3":
        raise UserError(
            f"the launch file says DeepSpeed with ZeRO stage {stage}, but saekit trains with stage 3 only "
            "(--placement zero3): write zero_stage: 3, or use a launch file for ddp"
        )
    for name, device in devices.items():
        if (device or "none") not in DEVICES:
            raise UserError(
                f"the launch file says {name}_device: {device}, but saekit knows {' and '.join(DEVICES)} only"
            )
    return {name: device or "none" for name, device in devices.items()}


def merged(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """One optimizer for several layers' parameters, a group for each; the first of them."""
    first, *others = optimizers
    for other in others:
        for group in other.param_groups:
            first.add_param_group(group)
    return first


def without_waits(zero_optimizer: Any) -> None:
    """Keep DeepSpeed's stage 3 from making the host wait for the device, and from computing norms that nobody uses.

    The host waits at one place in a step, for the step's message, which shows NaN and Inf in the gradients: DeepSpeed
    need not look for them again.
    """
    # It ends every backward pass by waiting for this stream. What is queued behind it waits on the device.
    if (stream := zero_optimizer.reduce_and_partition_stream) is not None:  # None on a CPU
        stream.synchronize = lambda: torch.cuda.current_stream(stream.device).wait_stream(stream)
    # Before it steps, an all-reduce and a wait for each group: the norm for clipping, which is off.
    zero_optimizer._get_norm_groups = lambda: [torch.zeros(())]
    # Of each gradient that it offloads, on the device. The sum serves us, and needs no copy in float64.
    zero_optimizer._constant_buffered_norm2 = torch.sum


def silence() -> None:
    """Keep DeepSpeed from speaking of what is known and right."""
    # It calls collectives that torch has renamed, six times per step and rank.
    warnings.filterwarnings(
        "ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated", FutureWarning, append=False
    )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else every rank warns that it has found no GPU
