"""Measure the type in which a CPU selects fastest, once per shape of a run, and cache it for the user.

A CPU's flags say which instructions it has, but not how fast they are. Of two CPUs that multiply bfloat16, one may be
faster in 8 bits. `auto` therefore times the real operation, an SAE's encoder, for some tenths of a second.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saekit._version import __version__
from saekit.machine import cache_folder, cpu_model
from saekit.sae.kernels.choose import SELECT_DTYPES, choose_kernels, has_fast_bf16, has_fast_int8
from saekit.sae.kernels.sparse import least_latents, low_precision_pays

FILE = "selecting.json"
LEAST_WORK = 2**30
"""The least number of products in an encoder that is measured. With fewer, every type takes only milliseconds."""
WEIGHTS = 2**21
"""The most weights of the timed encoder. A larger one takes proportionally longer in every type."""
FEW, MANY = 64, 512
"""Numbers of tokens that are timed. Two of them separate the cost per call (the weights) from the cost per token."""
ROUNDS = 4
HOPELESS = 8
"""A type slower than the best by this factor is timed only once. torch emulates instructions that a CPU lacks."""
CPU = torch.device("cpu")


class Work(NamedTuple):
    """The shape of one call of an SAE's encoder."""

    tokens: int
    d_in: int
    num_latents: int
    k: int
    """Latents to find per token."""

    @property
    def is_measured(self) -> bool:
        """Return whether the type matters: the work is large enough, and low precision can save time."""
        large = self.tokens * self.d_in * self.num_latents >= LEAST_WORK
        return large and low_precision_pays(self.k, self.num_latents)

    @property
    def layer(self) -> str:
        """Return the part of the key that describes the coder, without the number of tokens."""
        return f"D {self.d_in}, M {self.num_latents}, k {self.k}"

    @property
    def key(self) -> str:
        """Return the key in the cache file."""
        return f"{self.layer}, N {self.tokens}"


Seconds = dict[str, float]
"""Seconds by type of selection, with its name in `--select-dtype`."""


def cache_file() -> Path:
    """Return the file that caches measurements. Without it, the next run measures again."""
    return cache_folder() / FILE


def seconds_by_type(backend: str, work: Work) -> Seconds:
    """Return the encoder's time in seconds by type, from the cache or by measuring now.

    Args:
        backend: `cpu` or `native`.
        work: The shape of the run's encoder.
    """
    seconds = known(backend).get(work.key)
    if seconds is None:
        seconds = measure(backend, work)
        _store(backend, work, seconds)
    return seconds


def remembered(backend: str, work: Work) -> Seconds | None:
    """Return the cached measurement of such a coder, if necessary for another number of tokens. None without one."""
    found = known(backend)
    return found.get(work.key) or next((each for key, each in found.items() if key.startswith(f"{work.layer},")), None)


def fastest(seconds: Mapping[str, float]) -> str:
    """Return the type that takes the least time. Among equals, return the most exact one."""
    return min(seconds, key=lambda name: seconds[name])


def measure(backend: str, work: Work) -> Seconds:
    """Time the encoder in every type that this CPU has instructions for.

    Each round times all types, so that a slow moment of the machine affects all of them. The fastest round of each
    counts.

    Returns:
        Seconds by type, for `work.tokens` tokens and the weights of the timed encoder (`WEIGHTS`).
    """
    tokens, d_in, num_latents, k = work
    timed = max(least_latents(k), min(num_latents, WEIGHTS // d_in))
    many, few = min(MANY, tokens), min(FEW, tokens)
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(many, d_in, generator=generator)
    W_MD = torch.nn.functional.normalize(torch.randn(timed, d_in, generator=generator), dim=1)
    b_M = torch.zeros(timed)
    best: dict[str, dict[int, float]] = {}
    with torch.inference_mode():
        for number in range(ROUNDS + 1):
            for name in types():
                before = best.setdefault(name, {})
                if number > 0 and before[few] > HOPELESS * min(each[few] for each in best.values()):
                    continue
                kernels = choose_kernels(backend, name, CPU)
                for count in {few, many}:
                    start = time.perf_counter()
                    kernels.encode_topk(x_ND[:count], W_MD, b_M, k)
                    spent = time.perf_counter() - start
                    before[count] = spent if number < 2 else min(spent, before[count])  # the first round warms up
    return {name: _extrapolate(each, few, many, tokens) for name, each in best.items()}


def _extrapolate(spent: Mapping[int, float], few: int, many: int, tokens: int) -> float:
    """Extrapolate linearly from the timed numbers of tokens, `few` and `many`, to all `tokens`, in seconds."""
    per_token = max(0.0, spent[many] - spent[few]) / (many - few) if many > few else 0.0
    return spent[many] + per_token * (tokens - many)


def types(device: torch.device = CPU) -> tuple[str, ...]:
    """Return the types of selection that a device has instructions for."""
    if device.type != "cpu":
        return ("fp32", "bf16") if has_fast_bf16(device) else ("fp32",)
    has = {"fp32": True, "bf16": torch.cpu._is_avx512_bf16_supported() or has_fast_bf16(device)}
    has["int8"] = has_fast_int8(device)
    return tuple(name for name in SELECT_DTYPES if has[name])


def known(backend: str) -> dict[str, Seconds]:
    """Return the cached measurements of this CPU with this process's number of threads, by `Work.key`.

    An unreadable cache file is treated like an empty one.
    """
    found = _read().get(_machine(backend), {})
    return {key: seconds for key, seconds in found.items() if set(seconds) == set(types())}


def _machine(backend: str) -> str:
    """Describe everything that a measurement depends on other than the work."""
    has = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "VNNI": torch.cpu._is_vnni_supported(),
    }
    flags = "".join(f", {name}" for name, there in has.items() if there)
    threads = f"{torch.get_num_threads()} threads"
    return f"{cpu_model()}{flags}, {threads}, torch {torch.__version__}, saekit {__version__}, {backend}"


def _read() -> dict[str, dict[str, Seconds]]:
    try:
        kept = json.loads(cache_file().read_text(encoding="utf-8"))
        return {
            str(machine): {str(key): {str(name): float(each) for name, each in seconds.items()} for key, seconds in own}
            for machine, own in ((machine, works.items()) for machine, works in kept.items())
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _store(backend: str, work: Work, seconds: Seconds) -> None:
    """Add a measurement to the cache file, if it is writable.

    A measurement that another process adds at the same time may be lost, and is measured again.
    """
    everything: dict[str, Any] = _read()
    everything.setdefault(_machine(backend), {})[work.key] = seconds
    file = cache_file()
    with suppress(OSError), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder, FILE)
        made.write_text(json.dumps(everything, indent=1), encoding="utf-8")
        os.replace(made, file)
