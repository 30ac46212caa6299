"""Hookpoints by name: what they belong to, and the seeds of units there."""

import pytest

from saekit.activations.hookpoints import Hookpoint


@pytest.mark.parametrize(
    ("name", "module", "side", "layer", "is_block"),
    [
        ("layers.3", "layers.3", "out", 3, True),
        ("encoder.layer.0", "encoder.layer.0", "out", 0, True),
        ("layers.3:in", "layers.3", "in", 3, False),
        ("layers.3.mlp:in", "layers.3.mlp", "in", 3, False),
        ("layers.3.mlp.experts.1", "layers.3.mlp.experts.1", "out", 3, False),
        ("embed_tokens", "embed_tokens", "out", None, False),
    ],
)
def test_what_a_name_says(name, module, side, layer, is_block):
    found = Hookpoint(name, 16)
    assert (found.module, found.side, found.layer, found.is_block) == (module, side, layer, is_block)


def test_every_hookpoint_has_a_seed_of_its_own():
    names = [
        "layers.0",
        "layers.1",
        "layers.1:in",
        "layers.1.mlp",
        "layers.1.mlp:in",
        "layers.1.self_attn",
        "layers.1.experts.0",
        "norm",
    ]
    seeds = [Hookpoint(name, 16).seed(init_seed) for name in names for init_seed in (0, 1)]
    assert len(set(seeds)) == len(seeds)
    assert Hookpoint("h.7", 16).seed(3) == Hookpoint("layers.7", 32).seed(3) == 3 * 100_003 + 7
