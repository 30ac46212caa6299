"""Crosscoders of the same hookpoint in two models: `--crosscode-models`."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from saekit import Sae, SaeConfig, SaeTrainer, TrainConfig, UserError
from saekit.activations import tap
from saekit.activations.live import LiveModel
from saekit.activations.sites import hookpoints_of
from saekit.report import Reporters
from tests.training.conftest import CTX_LEN, SETTINGS, StopAfter
from tests.training.runs import assert_same_tensors, tensors_of
from tests.training.test_transcoders import Recorder

STILL = {"lr": 1e-9, "revive_alpha": 0.0, "shuffle": False}


@pytest.fixture(scope="module")
def other(tiny_llama):
    """Another model: wider, of one block less, and with activations of another size."""
    torch.manual_seed(1)
    config = copy.deepcopy(tiny_llama.config)
    config.hidden_size, config.num_hidden_layers, config.initializer_range = 24, 2, 0.6
    return LlamaForCausalLM(config).eval()


def train(model, other, tokens, folder, *, name="run", reporter=None, **more):
    given = {"layers": (0, 1), "sae": SaeConfig(num_latents=64, k=4), "crosscode_models": "elsewhere", **more}
    cfg = TrainConfig(save_dir=folder, run_name=name, **{**SETTINGS, **given})
    trainer = SaeTrainer(cfg, tokens, model, other_model=other, reporter=reporter or Reporters())
    return trainer, trainer.fit()


def activations(models, input_ids):
    """Of blocks and MLPs of both models, by the names that they have in crosscoders."""
    of = {}
    for prefix, model in zip(("", "other."), models, strict=True):
        names = [f"layers.{layer}{part}" for layer in (0, 1) for part in ("", ".mlp:in")]
        with tap(model, names) as read:
            of |= {f"{prefix}{name}": acts.flatten(0, 1).clone() for name, acts in read(input_ids).items()}
    return of


@pytest.mark.parametrize("hookpoints", [None, ("mlp:in",)])
def test_each_hookpoint_is_read_and_predicted_in_both(tiny_llama, other, tokens, tmp_path, hookpoints):
    recorder = Recorder()
    more = {"hookpoints": hookpoints, **STILL}
    trainer, folder = train(tiny_llama, other, tokens, tmp_path, reporter=Reporters([recorder]), **more)
    names = ["layers.0", "layers.1"] if hookpoints is None else ["layers.0.mlp:in", "layers.1.mlp:in"]
    assert list(trainer.plan.hookpoints) == names
    saes = Sae.load_many(folder)
    assert list(saes) == names
    last = torch.tensor(tokens["input_ids"][48:])
    counted = ~torch.isin(last, torch.tensor([0, 1])).flatten()
    of = activations((tiny_llama, other), last)
    for name, sae in saes.items():
        assert sae.reads == sae.writes == {name: 16, f"other.{name}": 24}
        assert not sae.transcode
        x = torch.cat([of[each] for each in sae.reads], 1)[counted]
        x = x[sae.counted(x)]
        parts = zip(x.split([16, 24], 1), sae(x).recon.detach().split([16, 24], 1), strict=True)
        fvus = [float((a - b).square().sum() / (a - a.mean(0)).square().sum()) for a, b in parts]
        # Each scaled to one variance, that of the first batch.
        assert recorder.steps[-1].layers[name].fvu == pytest.approx(sum(fvus) / 2, rel=0.15)


def test_they_learn_and_go_on_exactly(tiny_llama, other, tokens, tmp_path):
    recorder = Recorder()
    _, whole = train(tiny_llama, other, tokens, tmp_path, name="whole", reporter=Reporters([recorder]))
    first, last = (sum(each.fvu for each in steps.layers.values()) for steps in (recorder.steps[0], recorder.steps[-1]))
    assert last < 0.8 * first
    with pytest.raises(KeyboardInterrupt):
        train(tiny_llama, other, tokens, tmp_path, name="halves", reporter=StopAfter(3))
    _, halves = train(tiny_llama, other, tokens, tmp_path, name="halves", resume=True)
    assert_same_tensors(tensors_of(halves), tensors_of(whole))
    with pytest.raises(UserError, match="--crosscode-models was elsewhere and is another"):
        train(tiny_llama, other, tokens, tmp_path, name="halves", resume=True, crosscode_models="another")


def test_two_copies_of_one_model_are_read_alike(tiny_llama, tokens):
    """What each gives, tokens that the other's config calls special being excluded from both."""
    twin = copy.deepcopy(tiny_llama)
    twin.config.eos_token_id = 7
    source = LiveModel(tiny_llama, tokens, other=twin, other_name="twin")
    source.begin(TrainConfig(layers=(0, 2), batch_size=4, crosscode_models="twin"), torch.device("cpu"), 0, 1)
    assert source.excluded.tolist() == [0, 1, 7]
    assert list(source.hookpoints) == list(hookpoints_of(source.sites))
    with source.open():
        (batch,) = source.read(0)
        for _ in range(2):  # the first pass of a tap is unlike the others
            of = source(batch).of
    assert sorted(of) == ["layers.0", "layers.2", "other.layers.0", "other.layers.2"]
    assert of["layers.0"].shape == (source.count(batch), 16)
    for name in ("layers.0", "layers.2"):
        assert torch.equal(of[name], of[f"other.{name}"])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"layers": None}, "--crosscode-models elsewhere: it has no layers.2, its layers are layers.0 to layers.1"),
        ({"crosscode": ("resid",)}, "--crosscode-models goes with --hookpoints, not with --crosscode"),
        ({"transcode": True}, "--crosscode-models goes with --hookpoints, not with --transcode"),
        ({"reads": ("resid",), "writes": ("mlp",)}, "--crosscode-models goes with --hookpoints, not with --reads"),
        ({"crosscode_models": None}, "a second model is given without crosscode_models"),
        ({"crosscode_models": None, "crosscode_revision": "step1"}, "--crosscode-revision needs --crosscode-models"),
    ],
)
def test_contradictions_are_refused(tiny_llama, other, tokens, tmp_path, given, problem):
    with pytest.raises(UserError, match=problem):
        train(tiny_llama, other, tokens, tmp_path, **given)


def test_both_models_must_be_able_to_read_the_data(tiny_llama, tokens, tmp_path):
    with pytest.raises(UserError, match="crosscode_models is given without a second model"):
        train(tiny_llama, None, tokens, tmp_path)
    for changed, problem in (
        ({"max_position_embeddings": CTX_LEN - 1}, "--ctx-len 12 is more than the 11 tokens"),
        ({"vocab_size": 19}, "but the model's vocabulary has 19 tokens"),
    ):
        config = copy.deepcopy(tiny_llama.config)
        config.update(changed)
        with pytest.raises(UserError, match=problem):
            train(tiny_llama, LlamaForCausalLM(config).eval(), tokens, tmp_path)
