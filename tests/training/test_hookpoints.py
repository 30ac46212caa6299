"""Training at hookpoints of several kinds and widths at once, in language models of many kinds."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModel

from saekit import SaeConfig, SaeTrainer, TrainConfig
from saekit.activations.live import LiveModel
from saekit.report import Reporters
from saekit.runs.locate import locate
from saekit.sae import Sae
from saekit.training.optimizers import base_lr
from saekit.training.schedule import dead_threshold
from tests.activations.odd_models import CONFIGS

MIXED = {
    "gpt2": "resid_pre,mlp:in,h.*.mlp.c_proj:in",
    "gpt-neox": "attn,layers.*.mlp.dense_4h_to_h:in",
    "gemma-3": "mlp,language_model.layers.*.self_attn.o_proj:in",
    "qwen3-moe": "mlp,layers.1.self_attn.o_proj:in,norm",
    "mamba-2": "resid,layers.*.mixer",
    "bert": "encoder.layer.*.intermediate,resid",
    "modernbert": "attn,mlp:in",
    "falcon": "mlp,attn",
}

SKIP = SaeConfig(expansion_factor=2, k=2, skip_connection=True)
TRANSCODED = {
    "gpt2": {"transcode": True},
    "gpt-neox": {"transcode": True, "hookpoints": "attn", "sae": SKIP},
    "llama": {"reads": "layers.*.mlp.down_proj:in", "writes": "resid", "sae": SKIP},
    "gemma-3": {"transcode": True, "layers": "0-1"},
    "qwen3": {"crosscode": "resid,layers.1.self_attn.o_proj:in"},
    "qwen3-moe": {"transcode": True, "sae": SKIP},
    "mamba-2": {"reads": "resid_pre", "writes": "resid", "sae": SKIP},
    "bert": {"transcode": True, "hookpoints": "encoder.layer.*.intermediate", "sae": SKIP},
    "modernbert": {"transcode": True},
}
"""Transcoders, mostly of MLPs, and a crosscoder; of other widths in and out where there is such a module."""


def trainer(name, tmp_path, **options):
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIGS[name])
    ids = torch.randint(5, 99, (8, 12), generator=torch.Generator().manual_seed(0))
    sae = options.pop("sae", SaeConfig(expansion_factor=2, k=2))
    cfg = TrainConfig(sae, save_dir=tmp_path, run_name=name, batch_size=4, shuffle=False, **options)
    return SaeTrainer(
        cfg, source=LiveModel(model, Dataset.from_dict({"input_ids": ids.tolist()})), reporter=Reporters()
    )


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {"hookpoints": each}) for name, each in MIXED.items()), *TRANSCODED.items()]
)
def test_two_steps(name, options, tmp_path):
    run = trainer(name, tmp_path, **options)
    folder = run.fit()
    saes = Sae.load_many(folder)
    assert {each: (sae.d_in, sae.num_latents, sae.d_out) for each, sae in saes.items()} == {
        each.name: (each.d_in, 2 * each.d_in, each.d_out) for each in run.plan.sites
    }
    assert {part.name for site in run.plan.sites for part in site.parts} == {
        each.name for each in run.plan.source.hookpoints
    }
    assert all(sae.W_skip is None or sae.W_skip.any() for sae in saes.values())
    assert all(torch.isfinite(sae.W_dec).all() and not torch.equal(sae.W_enc, sae.W_dec) for sae in saes.values())


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"transcode": True, "layers": "0"}, "h.0.mlp"),
        ({"reads": "h.0.mlp.c_proj:in", "writes": "h.1.attn"}, "h.1.attn"),
        ({"crosscode": "resid", "layers": "0-1"}, "h.1"),
    ],
)
def test_nothing_behind_the_last_hookpoint_is_computed(options, last, tmp_path):
    run = trainer("gpt2", tmp_path, **options)
    ran = []
    for name, module in run.source.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    run.fit()
    leaves = dict.fromkeys(name for name in ran if not any(run.source.model.get_submodule(name).children()))
    assert next(reversed(leaves)).startswith(last)


def test_defaults_are_those_of_each_units_width(tmp_path):
    run = trainer("gpt2", tmp_path, hookpoints=MIXED["gpt2"])
    run.fit()
    for unit in run.plan.units:
        width = unit.site.d_in
        assert unit.num_latents == 2 * width
        assert unit.lr == base_lr(run.plan.cfg, 2 * width, width)
        assert unit.dead_threshold == dead_threshold(None, total_tokens=96, step_tokens=48, num_latents=2 * width, k=2)
    rates = {unit.site.d_in: unit.lr for unit in run.plan.units}
    assert len(rates) == 2
    assert rates[32] > rates[128]
    assert list(run.plan.costs.values())[:3] == [2 * 32**2, 2 * 32**2, 2 * 128**2]


def test_company_and_the_rest_of_the_model_change_nothing(tmp_path):
    """A unit among units of other widths is the unit alone, to the bit; its folder's name is read back."""
    together = Sae.load_many(trainer("gpt2", tmp_path / "a", hookpoints=MIXED["gpt2"]).fit())
    folder = trainer("gpt2", tmp_path / "b", hookpoints="h.1.mlp.c_proj:in").fit()
    assert (folder / "h.1.mlp.c_proj@in" / "cfg.json").is_file()
    assert list(locate(folder).saes) == ["h.1.mlp.c_proj:in"]
    (alone,) = Sae.load_many(folder).values()
    for name, weights in alone.state_dict().items():
        assert torch.equal(weights, together["h.1.mlp.c_proj:in"].state_dict()[name])


def test_the_short_name_for_the_residual_stream_is_the_default(tmp_path):
    named, default = (
        Sae.load_many(trainer("gpt2", tmp_path / str(options), **options).fit())
        for options in ({"hookpoints": "resid", "layers": (0, 2)}, {"layers": (0, 2)})
    )
    assert named.keys() == default.keys() == {"h.0", "h.2"}
    for name, sae in named.items():
        assert torch.equal(sae.W_enc, default[name].W_enc)
