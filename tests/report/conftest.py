from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from saekit.report.stats import LayerStats, RunInfo, StepStats


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_info(tmp_path: Path) -> Callable[..., RunInfo]:
    def make(layers: int = 2, start_step: int = 0, names: Sequence[str] | None = None) -> RunInfo:
        return RunInfo(
            run_dir=tmp_path / "run",
            model="EleutherAI/pythia-14m",
            dataset="wikitext [train]",
            hookpoints=tuple(names or [f"layers.{i}" for i in range(layers)]),
            d_in=128,
            num_latents=4096,
            k=32,
            total_steps=1000,
            total_sequences=64_000,
            ctx_len=256,
            start_step=start_step,
            device="cpu",
            placement="single",
            dtype="float32",
            global_batch=64,
            config={"lr": None, "sae": {"k": 32, "multi_topk": False}, "layers": [0, 1], "dataset": "wikitext"},
        )

    return make


@pytest.fixture
def make_stats() -> Callable[..., StepStats]:
    def make(step: int, layers: int = 2, fvu: float = 0.5, names: Sequence[str] | None = None) -> StepStats:
        names = names or [f"layers.{i}" for i in range(layers)]
        return StepStats(
            step=step,
            tokens=step * 16_000,
            tokens_per_second=12_345.6,
            learning_rate=2e-4,
            memory_bytes=3 * 2**30,
            layers={
                name: LayerStats(
                    fvu=fvu + i / 100, l0=31.5, dead=41 * i, num_latents=4096, loss=0.6, auxk_loss=0.8 if i else 0.0
                )
                for i, name in enumerate(names)
            },
        )

    return make
