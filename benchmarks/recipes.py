"""The recipes in the comparison of quality: each toolkit's defaults, and sweeps for the peers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SAEKIT, SPARSIFY, DICTIONARY_LEARNING = "saekit", "sparsify", "dictionary-learning"
FORK = "dictionary-learning fork"
"""github.com/jkminder/dictionary_learning, which has crosscoders; the package on PyPI has none."""
ADAM_RATES = (5e-4, 2e-3, 5e-3, 1e-2, 2e-2)
SIGNUM_RATES = (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
UNIT_RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
CROSSCODER_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
NESTED = (0.125, 0.25, 1.0)
REFERENCE = {
    "optimizer": "adam",
    "init": "uniform",
    "scale_biases": False,
    "decoder_lr_ratio": 1.0,
    "encoder_bias_lr_ratio": 1.0,
    "beta2": 0.999,
    "revive_alpha": 0.0,
    "auxk_alpha": 0.0,  # sparsify's encoder does not see its gradient
    "max_norm_multiple": 0.0,
}
"""saekit's options for what sparsify does, without learning rate and warm-up."""


@dataclass(frozen=True)
class Recipe:
    """One way to train: everything except the model, the data, k, the number of latents and the seed."""

    toolkit: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Options by the toolkit's own names; others keep their defaults. Options of the SAE itself are under `sae`."""

    @property
    def label(self) -> str:
        """Return the label in tables and in the file of results."""
        return f"{self.toolkit} {self.name}"


def transcoder_recipes(steps: int) -> Iterator[Recipe]:
    """Yield the recipes for transcoders: defaults, and sweeps of sparsify's two optimizers, each with and without skip.

    Args:
        steps: Optimizer steps of a run.
    """
    warmup = max(1, steps // 10)
    for name, sae in (("", {}), ("skip ", {"skip_connection": True})):
        extra = {"sae": sae} if sae else {}
        yield Recipe(SAEKIT, f"{name}defaults", extra)
        for rate in ADAM_RATES:
            yield Recipe(
                SPARSIFY, f"{name}adam {rate:g}", {"optimizer": "adam", "lr": rate, "lr_warmup_steps": warmup, **extra}
            )
        for rate in SIGNUM_RATES:
            yield Recipe(SPARSIFY, f"{name}signum {rate:g}", {"optimizer": "signum", "lr": rate, **extra})


def crosscoder_recipes(steps: int) -> Iterator[Recipe]:
    """Yield the recipes for crosscoders: two of saekit's selections, and a sweep of the fork's BatchTopK crosscoder.

    By default, the fork scales all hookpoints by one number, so that those with a large variance dominate the loss. The
    comparison is by the mean of FVUs, so the sweep scales each hookpoint to the same variance, as saekit does. The best
    learning rate then also runs with the fork's default scaling.

    Args:
        steps: Optimizer steps of a run.
    """
    yield Recipe(SAEKIT, "defaults")
    yield Recipe(SAEKIT, "batchtopk", {"sae": {"activation": "batchtopk"}})
    warmup = max(1, steps // 10)
    schedule = {
        "warmup_steps": warmup,
        "decay_start": max(warmup + 1, int(0.8 * steps)),
        "threshold_start_step": min(1000, steps // 2),
        "threshold_beta": 0.98,
    }
    for rate in CROSSCODER_RATES:
        yield Recipe(FORK, f"{rate:g}", {"lr": rate, "scale_each": True, **schedule})
    yield Recipe(FORK, "one scale 0.001", {"lr": 1e-3, "scale_each": False, **schedule})


def recipes(steps: int) -> Iterator[Recipe]:
    """Yield the recipes for SAEs, the most informative first.

    The peers' default warm-up of 1000 steps is longer than a short run. A sweep therefore sets it to a tenth of the
    run, as a careful user would. Sweeps of dictionary-learning scale its inputs and let the learning rate fall over the
    last fifth of the run, as in its own example.

    Args:
        steps: Optimizer steps of a run.
    """
    warmup = max(1, steps // 10)
    yield Recipe(SAEKIT, "defaults")
    for rate in ADAM_RATES:
        yield Recipe(SPARSIFY, f"adam {rate:g}", {"optimizer": "adam", "lr": rate, "lr_warmup_steps": warmup})
    for rate in SIGNUM_RATES:
        yield Recipe(SPARSIFY, f"signum {rate:g}", {"optimizer": "signum", "lr": rate})
    falling = {"warmup_steps": warmup, "decay_start": max(warmup + 1, int(0.8 * steps))}
    for rate in UNIT_RATES:
        yield Recipe(DICTIONARY_LEARNING, f"{rate:g}", {"lr": rate, "normalize_activations": True, **falling})
    yield Recipe(SPARSIFY, "defaults")
    yield Recipe(SPARSIFY, "adam", {"optimizer": "adam"})
    # dictionary-learning does not accept a warm-up that is longer than the run.
    yield Recipe(DICTIONARY_LEARNING, "defaults", {"warmup_steps": min(1000, steps - 1)})
    for name, sae in (
        ("batchtopk", {"activation": "batchtopk"}),
        ("groupmax", {"activation": "groupmax"}),
        ("matryoshka", {"matryoshka": NESTED}),
        ("matryoshka batchtopk", {"matryoshka": NESTED, "activation": "batchtopk"}),
    ):
        yield Recipe(SAEKIT, name, {"sae": sae})
    for steps_mixed in (4, 16):
        yield Recipe(SAEKIT, f"mix {steps_mixed}", {"mix": steps_mixed})
    for rate in (5e-3, 1e-2):
        adam = {"optimizer": "adam", "lr": rate, "lr_warmup_steps": warmup}
        yield Recipe(SPARSIFY, f"groupmax adam {rate:g}", {"sae": {"activation": "groupmax"}, **adam})
    for rate in UNIT_RATES[2:]:
        # By default the threshold is estimated from step 1000 on, over about 1000 steps: use less in short runs.
        sought = {"threshold_start_step": min(1000, steps // 2), "threshold_beta": 0.999 if steps > 5000 else 0.98}
        settings = {"lr": rate, "normalize_activations": True, **falling, **sought}
        yield Recipe(DICTIONARY_LEARNING, f"batchtopk {rate:g}", {"sae": {"activation": "batchtopk"}, **settings})
    # sparsify's version of the recipe of Gao et al., in saekit: it should agree with `sparsify adam 0.002`.
    yield Recipe(SAEKIT, "as sparsify adam 0.002", {**REFERENCE, "lr": 2e-3, "lr_warmup_steps": warmup})
