"""Runs that start from SAEs which are there already."""

import pytest
import torch
from safetensors.torch import load_file

from saekit import Sae, SaeConfig, UserError
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import autoencoder, crosscoder, join, transcoder
from saekit.training.finetune import Shape, check_finetune
from tests.training.conftest import KINDS, Recorder

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


def fvu_of(trainer, coder, site, scale):
    """Of a coder, as it is in its files, on the first batch of a run."""
    parts = []
    with trainer.source.open():
        for batch in trainer.source.read(0):
            acts = trainer.source(batch)
            x_NW = join(acts.of, [site])[site.name].float()
            parts.append(x_NW if acts.counted_N is None else x_NW[acts.counted_N])
    x_NW = torch.cat(parts)
    x_ND, y_ND = (x_NW[:, : site.d_in], x_NW[:, site.d_in :]) if site.transcodes else (x_NW, x_NW)
    counted_N = coder.counted(x_ND, y_ND if site.transcodes else None)
    with torch.no_grad():
        error_ND = (coder(x_ND).recon - y_ND)[counted_N] * scale
    y_ND = y_ND[counted_N] * scale
    return float(error_ND.square().sum() / (y_ND - y_ND.mean(0)).square().sum())


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder"])
def test_finetune_begins_where_a_coder_of_another_kind_ended(make_trainer, tmp_path, kind):
    """Its weights in their files are for activations as they are, and it is trained on others."""
    options, of_sae = KINDS[kind]
    options = {**options, "sae": SaeConfig(num_latents=64, k=4, **of_sae)}
    before = Sae.load_many(make_trainer("earlier", **options).fit())
    watcher = Recorder()
    trainer = make_trainer("later", finetune=tmp_path / "earlier", reporter=watcher, lr=1e-12, **options)
    latest = trainer.fit()
    after = Sae.load_many(latest)
    for site in trainer.plan.sites:
        state = load_file(latest / site.name / "state.safetensors")
        scale = 1 if site.transcodes else state["frame.scale"]
        found = watcher.steps[0].layers[site.name].fvu
        assert found == pytest.approx(fvu_of(trainer, before[site.name], site, scale), rel=1e-4)
        for name, weights in before[site.name].state_dict().items():
            torch.testing.assert_close(after[site.name].state_dict()[name], weights, rtol=1e-4, atol=1e-5)
    if kind == "transcoder":
        assert all(sae.W_skip.abs().max() > 1e-3 for sae in before.values())
        without = {**options, "sae": SaeConfig(num_latents=64, k=4)}
        with pytest.raises(UserError, match=r"layers.0.mlp has a skip connection, this run's has none"):
            make_trainer("without", finetune=tmp_path / "earlier", **without).fit()


def test_finetune_says_where_latents_were_chosen_otherwise(make_trainer, tmp_path):
    make_trainer("earlier").fit()
    for run_name, sae, warned in (
        ("same", SaeConfig(num_latents=64, k=4), []),
        ("k", SaeConfig(num_latents=64, k=5), ["Warning: the SAEs of --finetune have k 4, this run has k 5"]),
        (
            "kind",
            SaeConfig(num_latents=64, k=4, activation="groupmax"),
            ["Warning: the SAEs of --finetune have k 4, this run has k 4 (groupmax)"],
        ),
    ):
        watcher = Recorder()
        make_trainer(run_name, finetune=tmp_path / "earlier", sae=sae, reporter=watcher).fit()
        assert [message for message in watcher.said if "--finetune" in message] == warned


def test_finetune_of_another_size_is_refused(make_trainer, tmp_path):
    make_trainer("earlier").fit()
    with pytest.raises(UserError, match="has 64 latents for width 16, this run's has 32"):
        make_trainer("later", finetune=tmp_path / "earlier", sae=SaeConfig(num_latents=32, k=4)).fit()
    assert not (tmp_path / "later").exists()


IN, OUT = Hookpoint("layers.0", 16), Hookpoint("layers.1.mlp", 16)
SITES = {
    "sae": autoencoder(OUT),
    "transcoder": transcoder(IN, OUT),
    "crosscoder": crosscoder([IN, OUT]),
}


@pytest.mark.parametrize(
    ("earlier", "wanted", "skip", "said"),
    [
        ("transcoder", SITES["sae"], False, "for width 16, to be transcoded to width 16, this run's .* width 16$"),
        ("sae", SITES["transcoder"], False, "for width 16, this run's .* width 16, to be transcoded to width 16$"),
        ("transcoder", transcoder(Hookpoint("layers.1:in", 16), OUT), False, "this run's reads layers.1:"),
        ("skip", SITES["transcoder"], False, "has a skip connection, this run's has none: add --skip-connection$"),
        ("transcoder", SITES["transcoder"], True, None),
        (
            "crosscoder",
            crosscoder([OUT, IN]),
            False,
            r"reads layers.0 \(16\), layers.1.* this run's reads layers.1.mlp",
        ),
        ("crosscoder", SITES["crosscoder"], False, None),
        ("sae", SITES["crosscoder"], False, "has no coder for crosscoder, only for layers.1.mlp$"),
    ],
)
def test_coders_of_another_kind_are_refused_early(tmp_path, earlier, wanted, skip, said):
    site = SITES["transcoder" if earlier == "skip" else earlier]
    sizes = {}
    if earlier != "sae":
        sizes = {"reads": {each.name: each.width for each in site.reads}}
        sizes["writes"] = {each.name: each.width for each in site.writes}
    if site.transcodes:
        sizes |= {"transcode": True, "d_out": site.d_out, "skip_connection": earlier == "skip"}
    Sae(site.d_in, 64, 4, **sizes).save_to_disk(tmp_path / site.name)
    shapes = {wanted.name: Shape(wanted, 64, skip)}
    if said is None:
        check_finetune(tmp_path, shapes)
        return
    with pytest.raises(UserError, match=said) as refused:
        check_finetune(tmp_path, shapes)
    assert "\n" not in str(refused.value)


def test_an_sae_of_one_hookpoint_is_no_crosscoder_of_the_same_width(tmp_path):
    """Where the user names its folder, names of hookpoints may differ, as from model to model; kinds may not."""
    Sae(32, 64, 4).save_to_disk(tmp_path)
    with pytest.raises(UserError, match=r"for width 32, this run's has 64 latents for width 32 of several hookpoints$"):
        check_finetune(tmp_path, {"crosscoder": Shape(SITES["crosscoder"], 64, False)})
    check_finetune(tmp_path, {"layers.0": Shape(autoencoder(Hookpoint("layers.0", 32)), 64, False)})
