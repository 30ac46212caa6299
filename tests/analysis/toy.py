"""A language model of two tokens whose every number can be worked out on paper.

Token 0 is embedded as (2, 0) and token 1 as (0, 2); the blocks pass on what they are given; the logits are the
residual stream. So the model expects the last token again, by log-odds of 2. A third token, which it never predicts, is
embedded as (6, 6).
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig

from saekit import Sae
from saekit.analysis.subject import Subject, next_token
from saekit.sae.output import SaeOutput


class Block(nn.Module):
    def forward(self, x):
        return x


class Toy(nn.Module):
    device = torch.device("cpu")
    name_or_path = "toy"

    def __init__(self, depth=1):
        super().__init__()
        self.config = PretrainedConfig(hidden_size=2, num_hidden_layers=depth)
        self.embeddings = nn.Embedding.from_pretrained(torch.tensor([[2.0, 0.0], [0.0, 2.0], [6.0, 6.0]]))
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.passes = 0

    @property
    def base_model(self):
        return self

    def forward(self, input_ids):
        self.passes += 1
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=x)


class Scaling(nn.Module):
    """In an SAE's place: gives back so much of its input, by one latent of two; the other never fires."""

    d_in = d_out = num_latents = 2
    transcode, reads, writes = False, {}, {}
    trained_on = W_skip = max_norm_out = None

    def __init__(self, factor, max_norm=None):
        super().__init__()
        self.factor, self.max_norm = factor, max_norm

    counted, reconstruct = Sae.counted, Sae.reconstruct

    def forward(self, x):
        acts = torch.tensor([1.0, 0.0]).expand(*x.shape[:-1], 2)
        indices = torch.tensor([1, 0]).expand(*x.shape[:-1], 2)
        return SaeOutput(self.factor * x, acts, indices, acts > 0)


class Rows:
    def __init__(self, *rows):
        self.rows = torch.tensor(rows)
        self.ctx_len = self.rows.shape[1]

    def __len__(self):
        return len(self.rows)

    def read(self, numbers):
        return self.rows[torch.from_numpy(np.asarray(numbers))]


def subject(factor, rows=((0, 0, 1, 1), (1, 1, 0, 0)), excluded=(), depth=1, **changes):
    options = {
        "model": Toy(depth),
        "saes": {f"layers.{layer}": Scaling(factor) for layer in range(depth)},
        "data": Rows(*rows),
        "excluded": torch.tensor(excluded, dtype=torch.int64),
        "objective": next_token,
        "objective_name": "next token",
        **changes,
    }
    return Subject(**options)


def surprise(log_odds):
    """Nats that a token costs which was expected by such log-odds."""
    return math.log1p(math.exp(-log_odds))
