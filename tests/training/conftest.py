"""A tiny language model with random weights, and random tokens for it."""

import os
import signal

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from saekit import SaeConfig, SaeTrainer, TrainConfig
from saekit.report import Reporters

CTX_LEN, VOCAB, WIDTH = 12, 64, 16


@pytest.fixture(scope="session")
def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokens():
    """52 sequences: 6 optimizer steps of 8 and one of 4. A tenth of the tokens is special."""
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_dict({"input_ids": torch.randint(0, 20, (52, CTX_LEN), generator=generator).tolist()})


class Recorder:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.said, self.infos, self.steps, self.evaluations, self.saves, self.finished = [], [], [], [], [], 0

    def status(self, message):
        self.said.append(message)

    def start(self, info):
        self.infos.append(info)

    def step(self, stats):
        self.steps.append(stats)

    def evaluated(self, stats):
        self.evaluations.append(stats)

    def saved(self, path, step):
        self.saves.append(step)

    def finish(self):
        self.finished += 1


class StopAfter(Recorder):
    """Presses Ctrl-C when a step is reported, so that the next one is the last."""

    def __init__(self, step):
        super().__init__()
        self.stop_at = step

    def step(self, stats):
        super().step(stats)
        if stats.step == self.stop_at - 1:
            os.kill(os.getpid(), signal.SIGINT)


SETTINGS = {"batch_size": 8, "lr": 1e-2, "lr_warmup_steps": 2, "dead_feature_threshold": 150, "auxk_alpha": 1 / 32}
"""Of the tiny model's runs: short, with dead latents, and with both losses that revive them."""

ACROSS = {"reads": "layers.0.mlp.down_proj:in,layers.0", "writes": "layers.0.mlp,layers.1.mlp"}
"""Two transcoders: from the wide hidden layer of an MLP to its output, and from one layer to the next one's MLP."""
KINDS = {
    "sae": ({}, {}),
    "mixed": ({"hookpoints": "layers.0,layers.1.mlp.down_proj:in"}, {}),
    "transcoder": (ACROSS, {"skip_connection": True}),
    "crosscoder": ({"crosscode": "resid,layers.1.mlp.down_proj:in"}, {}),
}
"""By kind of coder the options of the training, and of its coders."""


@pytest.fixture
def make_trainer(tiny_llama, tokens, tmp_path):
    """A trainer of the tiny model with small settings; keyword arguments are those of `TrainConfig`."""

    def make(run_name="run", sae=None, reporter=None, data=None, **options):
        settings = {**SETTINGS, **options}
        cfg = TrainConfig(sae or SaeConfig(num_latents=64, k=4), save_dir=tmp_path, run_name=run_name, **settings)
        return SaeTrainer(cfg, data or tokens, tiny_llama, reporter=reporter or Reporters())

    return make
