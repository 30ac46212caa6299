"""Sets up DeepSpeed for zero3: its settings, its warnings, and changes to its optimizer."""

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
"""The devices that parameters and optimizer states may be offloaded to."""
OFFLOADED = {"offload_optimizer": "OPTIMIZER", "offload_param": "PARAM"}


def start_zero3() -> World:
    """Join the other ranks with accelerate's plugin for ZeRO stage 3.

    Raises:
        UserError: If DeepSpeed is missing, or the launch file asks for another stage or another way of offloading.
    """
    silence()
    offload = offload_devices(os.environ)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"--placement zero3 needs DeepSpeed, which cannot be imported ({error}): install it, or use --placement ddp"
        ) from error
    if not torch.cuda.is_available():
        # This shared-memory operation takes a minute to compile, and there may be no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # The number of CPUs to train on. Without it, DeepSpeed runs `numactl` in every backward pass.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # accelerate refuses settings from two places. `settings` already contains those of the launch file.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    world = start_world(DeepSpeedPlugin(hf_ds_config=settings(offload)))
    unset_hf_deepspeed_config()  # otherwise transformers would also shard the language model
    return world


def load_sharded(load: Callable[[], PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """Load a language model sharded over the ranks: each of its modules is gathered while it runs. Collective.

    Args:
        load: Loads the model with transformers, which keeps only this rank's shard of each tensor that it reads.
        dtype: The type of its weights.
    """
    import deepspeed

    config = settings(offload_devices(os.environ))
    config |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    # The weights never change, so biases and norms can stay whole on every rank.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 10_000
    told = HfDeepSpeedConfig(config)
    try:
        model = load()
    finally:
        del told
        unset_hf_deepspeed_config()
    deepspeed.initialize(model=model, config=config)  # adds the hooks that gather each module
    return model


def settings(offload: Mapping[str, str]) -> dict[str, Any]:
    """Return DeepSpeed's configuration. Each setting that is not its default has a reason.

    Args:
        offload: What `offload_devices` returned.
    """
    pins = torch.cuda.is_available()
    zero = {
        "stage": 3,
        # Shard small tensors, too: persistent ones would go stale, since DeepSpeed does not see the decoder's changes.
        "stage3_param_persistence_threshold": 0,
        # The default, 5e8 elements, is a buffer larger than most banks. Here gradients need not wait for a full bucket.
        "reduce_bucket_size": 1_000_000,
        # Only stage 2 can overlap communication with our own gradient accumulation.
        "overlap_comm": False,
        # Otherwise DeepSpeed replaces `torch.nn.functional.linear` for the whole process, the language model included.
        "memory_efficient_linear": False,
        # Pinned memory: otherwise the host waits for each copy between its memory and a GPU's.
        **{name: {"device": device, "pin_memory": pins} for name, device in offload.items() if device != "none"},
    }
    return {
        "zero_optimization": zero,
        "gradient_clipping": 0.0,  # the default clips at 1
        "managed_gradient_accumulation": False,  # a step has one backward pass per layer, so saekit ends the step
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 1,  # must be a number; not used
        "zero_force_ds_cpu_optimizer": False,  # saekit's own optimizers also step offloaded tensors
        "bf16": {"enabled": False},  # SAEs train in float32; the language model has its own type
        "fp16": {"enabled": False},
    }


def offload_devices(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the devices of `offload_optimizer` and `offload_param` in the launch file: `none` or `cpu`.

    Raises:
        UserError: If the launch file names another stage than 3 or offloads to a disk, or if its DeepSpeed
            configuration file cannot be read.
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
            f"the launch file says ZeRO stage {stage}, but saekit supports stage 3 only (--placement zero3): "
            "write zero_stage: 3, or use a launch file for ddp"
        )
    for name, device in devices.items():
        if (device or "none") not in DEVICES:
            raise UserError(
                f"the launch file says {name}_device: {device}, but saekit supports {' and '.join(DEVICES)} only: "
                "choose one of them"
            )
    return {name: device or "none" for name, device in devices.items()}


def merge_groups(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Add the parameter groups of all optimizers to the first one, and return it."""
    first, *others = optimizers
    for other in others:
        for group in other.param_groups:
            first.add_param_group(group)
    return first


def avoid_syncs(zero_optimizer: Any) -> None:
    """Stop DeepSpeed's stage 3 from making the host wait for the device and from computing unused norms.

    The host waits once per step, for the step's message. The message shows NaN and Inf in the gradients, so DeepSpeed
    need not look for them again.
    """
    # DeepSpeed ends every backward pass by waiting for this stream. Let the device's current stream wait instead.
    if (stream := zero_optimizer.reduce_and_partition_stream) is not None:  # None on a CPU
        stream.synchronize = lambda: torch.cuda.current_stream(stream.device).wait_stream(stream)
    # Before its step, DeepSpeed all-reduces and waits for each group's norm, to clip gradients. Clipping is off.
    zero_optimizer._get_norm_groups = lambda: [torch.zeros(())]
    # DeepSpeed computes the norm of each offloaded gradient. `collect` needs the sum, which makes no float64 copy.
    zero_optimizer._constant_buffered_norm2 = torch.sum


def silence() -> None:
    """Silence DeepSpeed's warnings about known and harmless conditions."""
    # DeepSpeed calls collectives by names that torch has deprecated, six times per step and rank.
    warnings.filterwarnings(
        "ignore", r".*(all_gather_into_tensor|reduce_scatter_tensor).*deprecated", FutureWarning, append=False
    )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every rank warns that it has found no GPU
