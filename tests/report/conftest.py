from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from saekit.report.stats import EvalStats, LayerStats, RunInfo, StepStats


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
    def make(layers: int = 2, start_step: int = 0, names: Sequence[str] | None = None, **more: object) -> RunInfo:
        hookpoints = tuple(names or [f"layers.{i}" for i in range(layers)])
        return RunInfo(
            run_dir=tmp_path / "run",
            model="EleutherAI/pythia-14m",
            dataset="wikitext [train]",
            hookpoints=hookpoints,
            widths=(128,) * len(hookpoints),
            latents=(4096,) * len(hookpoints),
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
            **more,
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
                    fvu=fvu + i / 100,
                    l0=31.5,
                    dead=41 * i,
                    num_latents=4096,
                    loss=0.6,
                    auxk_loss=0.8 if i else 0.0,
                    too_long=0.004,
                )
                for i, name in enumerate(names)
            },
        )

    return make


@pytest.fixture
def make_evaluation() -> Callable[..., EvalStats]:
    """Layer i has FVU `fvu` + i / 100; with a head it recovers 0.9 - i / 10, and all layers at once 0.5."""

    def estimate(value: float) -> dict[str, float | None]:
        return {"value": value, "low": value - 0.01, "high": None}

    def make(step: int, layers: int = 2, fvu: float = 0.25, head: bool = True) -> EvalStats:
        def grafted(recovered: float) -> dict[str, dict[str, float | None]]:
            names = ("ce", "ce_mean_ablated", "ce_zero_ablated", "ce_recovered_from_mean", "kl", "top1")
            return {**dict.fromkeys(names, estimate(2.0)), "ce_recovered": estimate(recovered)}

        record = {
            "layers": [
                {
                    "hookpoint": f"layers.{i}",
                    "reconstruction": {
                        "fvu": estimate(fvu + i / 100),
                        "explained_variance": estimate(0.75),
                        "cosine": estimate(0.9),
                        "l0": estimate(31.5),
                        "dead": 1024,
                        "num_latents": 4096,
                    },
                    "grafted": grafted(0.9 - i / 10) if head else None,
                }
                for i in range(layers)
            ],
            "together": grafted(0.5) if head else None,
            "ce_clean": estimate(1.5) if head else None,
        }
        return EvalStats(step, 3.0, record)

    return make
