"""A process group that is as strict as NCCL, on a machine without GPUs: gloo carries its data.

gloo takes what NCCL refuses, and gives at once what NCCL gives later, so code that has only run on gloo can be wrong on
GPUs. Here an operation

- is refused if one of its tensors is something that NCCL does not take, or that breaks later (`checks`);
- delivers in `wait()` and not before: until then outputs are NaN, or the largest number of their type (`operation`);
- fails if its inputs were changed or its outputs written to before `wait()`, or if nobody ever waited for it;
- is compared with the same operation of the other ranks before anything is sent: name, root, shapes and types. The
  error names the first that differs, and where each rank called it. NCCL would hang there, or mix up data (`group`).

Object collectives are refused: saekit has a control group for values that are pickled.

`install()` turns the data group of this process into one: what asks for the backend gloo at `init_process_group`.
Groups for which gloo is named later, like saekit's control group, stay gloo's.

It is milder than NCCL in some ways. There are no streams, so a kernel on another stream than the one that waited is not
noticed. An operation is carried out when somebody waits for it or for a later one; NCCL begins at once, so a rank that
waits too late costs nothing there and nothing here, but a deadlock between two groups can look different. The others
notice when a rank is gone, as gloo does; `STRICT_LOST=hang` lets them wait where no signal's handler runs, as NCCL
does. All tensors are on the CPU, so what would be on a GPU has to be told by other means (`stand_in`).
"""

from functools import wraps
from typing import Any

import torch.distributed as dist

from tests.strict import stand_in
from tests.strict.checks import StrictError
from tests.strict.group import StrictGroup

__all__ = ["StrictError", "StrictGroup", "install"]


def install(*, devices: bool) -> None:
    """Make the data group of this process strict, once it is made.

    With `devices` it also tells the host's tensors from the device's, which about doubles the time that a rank takes.
    """
    if hasattr(dist.Backend, "STRICT"):
        return
    dist.Backend.register_backend("strict", StrictGroup, devices=["cpu"])
    init = dist.init_process_group

    @wraps(init)
    def strictly(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        init("strict" if backend == "gloo" else backend, *args, **kwargs)

    dist.init_process_group = strictly
    if devices:
        stand_in.install()
