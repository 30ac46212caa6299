"""The Triton kernels compiled for GPUs that are not there, as the backend would launch them on one.

Triton's compiler and NVIDIA's assembler need no GPU. A process of its own, because the others interpret the kernels:
this file run as a script. It makes Triton believe in a device, turns every launch into a compilation, and calls the
backend's functions on tensors without data, so that what is compiled is what the code launches.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this system")

KIB = 1024
TARGETS = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB}
"""Compute capability (A100, L40, H100, B200), and the shared memory that a program may have there."""
FULL, ODD = (4096, 131072, 64, 8192), (70, 300, 3, 33)
"""D, M, k, N; the first are those of the benchmarks on a GPU."""
HUGE_M = 2**20
"""Times 4096, it is more than 32 bits hold."""
STEPS = 17
"""Of Adam; the 16th has numbers that Triton would compile in if it were let."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What was compiled, and what can be said of it: see `Device`."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env = outside | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DUMP_PTXAS_LOG": "1"}
    # What Triton warns of on a GPU would be an error in these tests there.
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture
def kernels(found, target):
    return [kernel for kernel in found["kernels"] if kernel["target"] == target]


def test_every_kernel_is_launched(found, kernels):
    assert {kernel["name"] for kernel in kernels} == set(found["names"])
    assert found["names"] == ["_gather_dot", "_gather_sum", "_maxima", "_members", "_segment_sum", "adam_rows"]


def test_shared_memory_suffices(kernels, target):
    used = {kernel["name"]: kernel["shared"] for kernel in kernels if kernel["shared"] > TARGETS[target]}
    assert not used


def test_nothing_is_spilled(kernels):
    spilled = [(kernel["name"], kernel["warps"], kernel["spills"]) for kernel in kernels if kernel["spills"]]
    assert not spilled


def test_the_assembler_sees_no_lost_performance(kernels):
    assert not [loss for kernel in kernels for loss in kernel["losses"]]


def test_offsets_have_64_bits(kernels):
    assert not [(kernel["name"], product) for kernel in kernels for product in kernel["narrow_products"]]


def test_grids_are_within_what_cuda_launches(kernels):
    for kernel in kernels:
        first, second, third = (*kernel["grid"], 1, 1)[:3]
        assert first < 2**31, kernel["name"]
        assert max(second, third) < 2**16, kernel["name"]


def test_launches_are_on_the_tensors_device(kernels):
    assert all(kernel["guarded"] for kernel in kernels)


def test_adam_is_compiled_once_for_all_steps(found, target):
    at_full_size = [kernel for kernel in found["kernels"] if kernel["target"] == target and kernel["size"] == FULL[1]]
    assert len([kernel for kernel in at_full_size if kernel["name"] == "adam_rows"]) == 4  # two types, rows or not


class Device:
    """Stands in for Triton's driver, and notes what would be launched."""

    def __init__(self):
        self.target, self.size, self.guards = 0, 0, 0
        self.kernels, self._seen = [], set()
        self.utils = self

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self):
        return self.target  # Triton keeps what it has compiled by device

    def get_current_stream(self, _device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": TARGETS[device]}

    @contextlib.contextmanager
    def guard(self, tensor):
        assert tensor.device.type == "meta"
        self.guards += 1
        yield
        self.guards -= 1

    def launcher(self, function, grid):
        """Takes the place of `function[grid]`."""

        def launch(*args, **kwargs):
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                compiled = function.run(*args, grid=grid, warmup=True, **kwargs)
            if (self.target, compiled.hash) not in self._seen:
                self._seen.add((self.target, compiled.hash))
                self.kernels.append(self._facts(compiled, grid, log.getvalue()))

        return launch

    def _facts(self, compiled, grid, log):
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        return {
            "target": self.target,
            "size": self.size,
            "name": compiled.name,
            "grid": grid,
            "guarded": self.guards > 0,
            "warps": compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
            "registers": int(re.search(r"Used (\d+) registers", log)[1]),
            "spills": int(spills[1]) + int(spills[2]),
            "losses": re.findall(r".*Performance Loss.*", log),
            "narrow_products": narrow_products(compiled.asm["ttir"]),
        }


def narrow_products(ttir):
    """Products of two numbers that are known at run time only, in 32 bits: rows times a width overflow them."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", ttir))
    products = re.findall(r"= arith\.muli (%\S+), (%\S+) : (?:tensor<\S*x)?i32\b", ttir)
    return [f"{one} * {two}" for one, two in products if not constants & {one, two}]


def compile_all():
    """Everything that a training step launches, for every target."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from saekit.sae.kernels import triton_adam, triton_ops
    from tests.sae.adam import adam_settings

    device = Device()
    driver.set_active(device)
    torch.cuda.device_of = device.guard
    JITFunction.__getitem__ = lambda function, grid: device.launcher(function, grid)
    for device.target in TARGETS:
        for size in (FULL, ODD) if device.target in (80, 90) else (FULL,):
            device.size = size[1]
            train(*size)
        device.size = HUGE_M
        moments = [torch.empty(HUGE_M, FULL[0], device="meta") for _ in range(4)]
        triton_adam.adam_(*moments, **adam_settings(1, unit_rows=True, device="meta"))
    everything = {**vars(triton_ops), **vars(triton_adam)}
    names = {each.__name__ for each in everything.values() if isinstance(each, JITFunction)} - {"_rounded"}
    json.dump({"kernels": device.kernels, "names": sorted(names)}, sys.stdout)


def train(d_in, num_latents, k, tokens):
    """Steps of an SAE on tensors without data; `Sae` itself starts from numbers on the CPU."""
    import torch

    from saekit.sae.kernels import triton_ops
    from saekit.sae.kernels.sparse import Sparse
    from saekit.training.adam import SaeAdam

    shapes = ((num_latents, d_in), (num_latents,), (num_latents, d_in), (d_in,))
    W_enc, b_enc, W_dec, b_dec = (torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes)
    x = torch.empty(tokens, d_in, device="meta")
    for select_dtype in (torch.bfloat16, None):
        kernels = Sparse("triton", triton_ops, select_dtype)
        recon, _, _ = kernels.autoencode(x, W_enc, b_enc, W_dec, b_dec, k)
        (recon - x).square().sum().backward()
    for moments_dtype in (torch.float32, torch.bfloat16):
        parameters = (W_enc, b_enc, W_dec, b_dec)
        options = {"betas": (0.9, 0.999), "unit_rows": [W_dec], "moments_dtype": moments_dtype}
        adam = SaeAdam(parameters, lr=1e-3, kernels=kernels, **options)
        for _ in range(STEPS):
            adam.prepare()
            adam.step()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    compile_all()
