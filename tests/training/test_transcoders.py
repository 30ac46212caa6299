"""Training transcoders and crosscoders: what is saved takes activations as they are, and predicts what was reported."""

from dataclasses import replace

import pytest
import torch

from saekit import Sae, SaeConfig, SaeTrainer, TrainConfig, UserError
from saekit.activations import tap
from saekit.activations.hookpoints import Hookpoint
from saekit.activations.sites import Site, autoencoder, crosscoder, join, transcoder
from saekit.report import Reporters
from saekit.training.frame import crosscoder_frame, transcoder_frame
from saekit.training.start import fit_, linear_map
from tests.training.conftest import Recorder

KINDS = {
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "sae": {"skip_connection": True}},
    "other width": {"reads": ("layers.*.mlp.down_proj:in",), "writes": ("mlp",), "sae": {"skip_connection": True}},
    "crosscoder": {"crosscode": ("resid", "layers.0.mlp.down_proj:in")},
}
STILL = {"lr": 1e-9, "revive_alpha": 0.0}
"""Rates at which weights stay as they began, as good as."""


def options(kind, **more):
    given = dict(KINDS[kind])
    return {"sae": SaeConfig(num_latents=64, k=4, **given.pop("sae", {})), **given, **more}


def train(model, tokens, folder, kind, **more):
    cfg = TrainConfig(save_dir=folder, run_name="run", batch_size=8, shuffle=False, **options(kind, **more))
    recorder = Recorder()
    trainer = SaeTrainer(cfg, tokens, model, reporter=Reporters([recorder]))
    return trainer, trainer.fit(), recorder


def read_and_written(model, sites, input_ids):
    """By site: what is read, and what is to be predicted."""
    names = dict.fromkeys(part.name for site in sites for part in site.parts)
    with tap(model, list(names)) as read:
        acts = {name: each.flatten(0, 1).clone() for name, each in read(input_ids).items()}
    return {
        site.name: tuple(torch.cat([acts[each.name] for each in parts], 1) for parts in (site.reads, site.writes))
        for site in sites
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_predicts_as_well_as_was_reported(tiny_llama, tokens, tmp_path, kind):
    trainer, folder, recorder = train(tiny_llama, tokens, tmp_path, kind, **STILL)
    last = torch.tensor(tokens["input_ids"][48:])
    counted = ~torch.isin(last, torch.tensor([0, 1])).flatten()  # beginnings and ends of text are excluded
    of = read_and_written(tiny_llama, trainer.plan.sites, last)
    saes = Sae.load_many(folder)
    assert list(saes) == list(trainer.plan.hookpoints)
    for name, sae in saes.items():
        x, y = (each[counted] for each in of[name])
        kept = sae.counted(x, y if sae.transcode else None)
        x, y, predicted = x[kept], y[kept], sae(x).recon.detach()[kept]
        widths = list(sae.writes.values())
        parts = zip(y.split(widths, 1), predicted.split(widths, 1), strict=True)
        if kind == "crosscoder":  # each scaled to one variance, that of the first batch
            mean = sum(float((a - b).square().sum()) / float((a - a.mean(0)).square().sum()) for a, b in parts)
            assert recorder.steps[-1].layers[name].fvu == pytest.approx(mean / len(widths), rel=0.15)
        else:
            fvu = float((y - predicted).square().sum() / (y - y.mean(0)).square().sum())
            assert recorder.steps[-1].layers[name].fvu == pytest.approx(fvu, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_they_learn(tiny_llama, tokens, tmp_path, kind):
    _, folder, recorder = train(tiny_llama, tokens, tmp_path, kind, lr=1e-2)
    first, last = (sum(each.fvu for each in steps.layers.values()) for steps in (recorder.steps[0], recorder.steps[-1]))
    assert last < first
    for sae in Sae.load_many(folder).values():
        if sae.transcode:
            assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
        assert sae.W_skip is None or sae.W_skip.any()


def frames():
    generator = torch.Generator().manual_seed(0)
    yield transcoder_frame(6, torch.randn(6, generator=generator), 3.0, 40.0), {"transcode": True, "d_out": 4}
    skip = {"transcode": True, "d_out": 4, "skip_connection": True}
    yield transcoder_frame(6, torch.randn(6, generator=generator), 300.0, 0.1), skip
    yield crosscoder_frame([2, 3, 1], [4.0, 0.1, 9.0]), {}


@pytest.mark.parametrize(("frame", "sizes"), list(frames()), ids=["transcoder", "skip", "crosscoder"])
def test_folded_weights_take_activations_as_they_are(frame, sizes):
    generator = torch.Generator().manual_seed(1)
    own, folded = (Sae(6, 32, 5, **sizes) for _ in range(2))
    for parameter in own.parameters():
        parameter.data.normal_(generator=generator)
    folded.load_state_dict(frame.fold(own.state_dict()))
    x_ND = 3 * torch.randn(50, 6, generator=generator)
    inside, outside = own(frame(x_ND)), folded(x_ND)
    assert torch.equal(inside.indices, outside.indices)
    assert torch.allclose(inside.acts, outside.acts, rtol=1e-4, atol=1e-4)
    scale = frame.scale_D if frame.shift_D is None else 1.0
    assert torch.allclose(inside.recon / scale, outside.recon, rtol=1e-3, atol=1e-3)
    back = frame.unfold(folded.state_dict())
    for name, tensor in own.state_dict().items():
        assert torch.allclose(back[name], tensor, rtol=1e-4, atol=1e-4)
        if name not in frame.inexact(own.state_dict()):
            assert torch.equal(back[name], tensor), name


def test_the_first_decoder_rows_are_where_a_linear_map_leads():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(8, 5, generator=generator)
    x_RD = torch.randn(400, 8, generator=generator)
    assert torch.allclose(linear_map(x_RD, x_RD @ A), A, rtol=0.2, atol=0.2)
    sae = Sae(8, 64, 4, transcode=True, d_out=5, generator=generator)
    fit_(sae, x_RD, x_RD @ A)
    images = sae.W_enc @ A
    assert torch.cosine_similarity(sae.W_dec, images).min() > 0.98
    assert float((sae(x_RD).recon.detach() - x_RD @ A).square().sum() / (x_RD @ A).square().sum()) < 0.6


def test_what_several_coders_need_is_given_to_all():
    a, b, c = (Hookpoint(name, width) for name, width in (("a", 2), ("b", 1), ("c", 2)))
    of = {each.name: torch.full((3, each.width), float(number)) for number, each in enumerate((a, b, c))}
    sites = (autoencoder(b), transcoder(a, c), crosscoder([a, b]))
    joined = join(of, sites)
    assert not of
    assert [joined[site.name][0].tolist() for site in sites] == [[1.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"reads": ("mlp",)}, "--reads is given without --writes"),
        ({"reads": ("mlp",), "writes": ("mlp",), "crosscode": ("resid",)}, "each say what to train on"),
        ({"transcode": True, "crosscode": ("resid",)}, "--transcode goes with --hookpoints, not with --crosscode"),
        ({"sae": SaeConfig(skip_connection=True)}, "--skip-connection is for transcoders"),
        ({"transcode": True, "hookpoints": ("mlp:in",)}, "trains from a module's input"),
        ({"reads": ("mlp",), "writes": ("resid_pre",)}, "the model computes layers.0:in first"),
        ({"reads": ("mlp",), "writes": ("mlp",)}, "use --hookpoints instead to train SAEs"),
        ({"reads": ("resid_pre",), "writes": ("layers.1.mlp",)}, "--reads names 3 hookpoints (layers.{0-2}:in) and"),
        ({"crosscode": ("layers.9",)}, "--crosscode layers.9: there is no such module"),
    ],
)
def test_contradictions_are_refused(tiny_llama, tokens, given, problem):
    def make():
        cfg = TrainConfig(**{"sae": SaeConfig(num_latents=32, k=2), **given})
        SaeTrainer(cfg, tokens, tiny_llama, reporter=Reporters())

    with pytest.raises(UserError) as caught:
        make()
    assert problem in str(caught.value)


def test_a_site_of_one_hookpoint_is_an_saes():
    point = Hookpoint("layers.0", 4)
    assert replace(crosscoder([point]), name=point.name) == autoencoder(point) == Site("layers.0", (point,), (point,))
