"""Runs that start from SAEs which are there already."""

import pytest
import torch

from saekit import Sae, SaeConfig, UserError
from tests.training.conftest import Recorder

HOOKPOINTS = ("layers.0", "layers.1", "layers.2")


def test_finetune_starts_from_earlier_saes(make_trainer, tmp_path):
    earlier = make_trainer("earlier").fit()
    watcher, fresh = Recorder(), Recorder()
    make_trainer("later", finetune=tmp_path / "earlier", reporter=watcher).fit()
    make_trainer("fresh", reporter=fresh).fit()
    for name in HOOKPOINTS:
        assert watcher.steps[0].layers[name].fvu < 0.9 * fresh.steps[0].layers[name].fvu
    one = make_trainer("one", finetune=earlier / "layers.1", layers="1")
    one.fit()


def test_finetune_from_decoder_rows_that_are_not_at_norm_1(make_trainer, tmp_path):
    earlier = make_trainer("earlier").fit()
    for name, sae in Sae.load_many(earlier).items():
        with torch.no_grad():
            sae.W_dec[:60].mul_(4)
            sae.W_enc[:60].div_(4)
            sae.b_enc[:60].div_(4)
            sae.W_dec[63] = 0
        sae.save_to_disk(tmp_path / "longer" / name)
        unit = Sae.load_from_disk(earlier / name)
        with torch.no_grad():
            unit.W_dec[63] = 0
        unit.save_to_disk(tmp_path / "unit" / name)
    runs = {}
    for name in ("longer", "unit"):
        runs[name] = Recorder()
        make_trainer(f"from {name}", finetune=tmp_path / name, reporter=runs[name], lr=1e-6).fit()
    for longer, unit in zip(runs["longer"].steps, runs["unit"].steps, strict=True):
        for name in HOOKPOINTS:
            assert longer.layers[name].fvu == pytest.approx(unit.layers[name].fvu, rel=1e-3)


def test_finetune_says_where_latents_were_chosen_otherwise(make_trainer, tmp_path):
    make_trainer("earlier").fit()
    for run_name, sae, warned in (
        ("same", SaeConfig(num_latents=64, k=4), []),
        ("k", SaeConfig(num_latents=64, k=5), ["Warning: the SAEs of --finetune have k 4, this run k 5"]),
        (
            "kind",
            SaeConfig(num_latents=64, k=4, activation="groupmax"),
            ["Warning: the SAEs of --finetune have k 4, this run k 4 (groupmax)"],
        ),
    ):
        watcher = Recorder()
        make_trainer(run_name, finetune=tmp_path / "earlier", sae=sae, reporter=watcher).fit()
        assert [message for message in watcher.said if "--finetune" in message] == warned


def test_finetune_of_another_size_is_refused(make_trainer, tmp_path):
    make_trainer("earlier").fit()
    with pytest.raises(UserError, match="has 64 latents for width 16, this run 32"):
        make_trainer("later", finetune=tmp_path / "earlier", sae=SaeConfig(num_latents=32, k=4)).fit()
    assert not (tmp_path / "later").exists()
