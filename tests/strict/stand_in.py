"""Tells the host's tensors from the device's on a machine that has only the host's memory.

On a GPU machine `torch.zeros(3)`, `x.cpu()` and what is read from a file are in the host's memory, where NCCL cannot
reach them; on a CPU they look like everything else. Here `cpu:0` is the device, and `cpu` without a number the host.
All calls of torch pass a mode that marks the host's tensors (`on_host`), as torch would place them on a GPU machine:

- what is made with no device named, or on `cpu`, is the host's; what is made on `cpu:0` is the device's;
- `x.cpu()` and `x.to("cpu")` give a copy on the host, `x.to("cpu:0")` one on the device; `x.device` says which it is;
- what is computed from the host's tensors alone is the host's, like their views.

saekit's ranks and DeepSpeed are told that they compute on `cpu:0`. Only tensors that are known to be the host's are
refused. Where torch's calls cannot be seen nothing is known, and nothing refused: gradients that autograd makes, what
C++ extensions (safetensors' too) return, and other threads. An operation on both kinds, which fails on a GPU, is not
refused.
"""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _device

from saekit.placement.world import World

DEVICE = torch.device("cpu", 0)
HOST = torch.device("cpu")
DEVICE_OF = Tensor.device.__get__
SET_DATA = Tensor.data.__set__
MOVES = {Tensor.to, Tensor.cpu}


class DeviceName(str):
    """What a library calls the device: the type alone means the current one, as `cuda` does."""

    __slots__ = ()


class StandIn(TorchFunctionMode):
    """Marks the host's tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == DEVICE_OF:
            found = func(*args)
            return DEVICE if found == HOST and not on_host(args[0]) else found
        target = asked_for(func, args, kwargs)
        if target is not None:  # memory is the host's in any case
            args = [HOST if is_device(each) else each for each in args] if func in MOVES else args
            kwargs = {name: HOST if is_device(each) else each for name, each in kwargs.items()}
        result = func(*args, **kwargs)
        given = list(tensors((*args, *kwargs.values())))
        if target is None and not given:
            target = _device.CURRENT_DEVICE or HOST  # `with torch.device(...)` puts itself below this mode
        host = all(map(on_host, given)) if target is None else target == HOST
        if func == SET_DATA:
            args[0].on_host = on_host(args[1])
        if func in MOVES and target is not None:
            if result is given[0] and on_host(result) != host:
                result = result.clone()
            result.on_host = host
        for each in tensors((result,)):
            if not hasattr(each, "on_host"):  # what is changed in place stays where it is
                each.on_host = host
        return result


def asked_for(func: Any, args: Any, kwargs: Any) -> torch.device | None:
    """The device that a call names, if it is one of the CPU's."""
    if func is Tensor.cpu:
        return HOST
    named = kwargs.get("device")
    if func is Tensor.to:
        for each in (*args[1:], kwargs.get("other")):
            if isinstance(each, Tensor):
                return HOST if on_host(each) else DEVICE
            named = each if is_device(each) else named
    if not is_device(named):
        return None
    return DEVICE if isinstance(named, DeviceName) or torch.device(named) == DEVICE else HOST


def is_device(value: Any) -> bool:
    """Tell whether it names one of the CPU's two memories."""
    return (
        value in ("cpu", "cpu:0") if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cpu"
    )


def on_host(tensor: Tensor) -> bool:
    """Tell whether a tensor is known to be the host's."""
    return getattr(tensor, "on_host", False)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among the values, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (each for each in value if isinstance(each, Tensor))


def install() -> None:
    """Watch this thread from now on, and let saekit's ranks and DeepSpeed compute on the device."""
    made = World.__init__

    def on_device(self: World, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        object.__setattr__(self, "device", DEVICE)
        if accelerator := sys.modules.get("deepspeed.accelerator.cpu_accelerator"):
            kind = accelerator.CPU_Accelerator
            kind.device_name = lambda self, index=None: DeviceName("cpu") if index is None else str(DEVICE)
            kind.current_device_name = lambda self: str(DEVICE)

    def from_numpy(array: Any) -> Tensor:
        tensor = read(array)
        tensor.on_host = True
        return tensor

    def safe_open(*args: Any, device: Any = "cpu", **kwargs: Any) -> Any:
        return opened(*args, device="cpu" if is_device(device) else device, **kwargs)

    def new_parameter(cls: type, data: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        parameter = made_parameter(cls, data, *args, **kwargs)
        parameter.on_host = on_host(data)
        return parameter

    World.__init__ = on_device
    made_parameter, torch.nn.Parameter.__new__ = torch.nn.Parameter.__new__, staticmethod(new_parameter)
    # Neither passes a mode, and safetensors knows no `cpu:0`: what comes of it is not known to be the host's.
    opened, safetensors.torch.safe_open = safetensors.torch.safe_open, safe_open
    read, torch.from_numpy = torch.from_numpy, from_numpy
    StandIn().__enter__()
