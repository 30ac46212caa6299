"""Whole runs of the loop in this process, on a tiny random Llama."""

import gc
import math

import pytest
import torch
from datasets import Dataset, concatenate_datasets

from saekit import Sae, SaeConfig, UserError
from tests.training.conftest import CTX_LEN, KINDS, WIDTH, Recorder
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

HOOKPOINTS = ("layers.0", "layers.1", "layers.2")


@pytest.fixture
def blocks_output(tiny_llama):
    """`[sequences, T, D]` of one block, by its own output, computed without our hooks."""

    def compute(input_ids, layer):
        found = []
        handle = tiny_llama.model.layers[layer].register_forward_hook(lambda m, a, out: found.append(out))
        with torch.no_grad():
            tiny_llama(torch.as_tensor(input_ids))
        handle.remove()
        return found[0]

    return compute


def test_a_run_learns_and_leaves_what_it_promises(make_trainer, tmp_path):
    watcher = Recorder()
    checkpoint = make_trainer(reporter=watcher).fit()
    assert checkpoint == (tmp_path / "run" / "step_00000007").resolve()
    assert [stats.step for stats in watcher.steps] == list(range(1, 8))
    assert watcher.saves == [7]
    assert watcher.finished == 1
    (info,) = watcher.infos
    assert (info.hookpoints, info.total_steps, info.total_sequences) == (HOOKPOINTS, 7, 52)
    saes = Sae.load_many(tmp_path / "run")
    assert tuple(saes) == HOOKPOINTS
    for sae in saes.values():
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("moment", ["collect", "apply"])
def test_activations_are_gone_before_the_optimizer_steps(make_trainer, monkeypatch, moment):
    trainer = make_trainer(exclude_special_tokens=False, micro_acc_steps=3)
    found = []
    original = getattr(trainer.placement, moment)

    def look(*arguments):
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        found.append([each.shape for each in tensors if each.ndim == 2 and each.shape == (8 * CTX_LEN // 3, WIDTH)])
        found.append([each.shape for each in tensors if each.ndim == 2 and each.shape == (8 * CTX_LEN, WIDTH)])
        return original(*arguments)

    monkeypatch.setattr(trainer.placement, moment, look)
    trainer.fit()
    assert len(found) == 2 * 7
    assert not any(found)


def test_every_layer_learns(make_trainer, tokens):
    watcher = Recorder()
    repeated = concatenate_datasets([tokens] * 8)
    make_trainer(reporter=watcher, data=repeated, auxk_alpha=0).fit()
    for name in HOOKPOINTS:
        assert watcher.steps[-2].layers[name].fvu < 0.7 * watcher.steps[0].layers[name].fvu


def test_reported_fvu_is_the_true_one(make_trainer, blocks_output, tokens, tmp_path):
    """The last step's FVU, from the SAEs as they were before it, against the definition."""
    watcher = Recorder()
    options = {"shuffle": False, "save_every": 6, "keep_last": 9, "select_dtype": "fp32"}
    make_trainer(reporter=watcher, **options).fit()
    before = Sae.load_many(tmp_path / "run" / "step_00000006")
    batch = torch.tensor(tokens["input_ids"][48:])
    kept = batch > 1  # 0 and 1 are the model's BOS and EOS
    assert 0 < kept.sum() < kept.numel()
    for layer, name in enumerate(HOOKPOINTS):
        x = blocks_output(batch, layer)[kept].double()
        with torch.no_grad():
            error = (x - before[name].double()(x).recon).square().sum()
        expected = error / (x - x.mean(0)).square().sum()
        assert watcher.steps[6].layers[name].fvu == pytest.approx(float(expected), rel=1e-4)
        assert watcher.steps[6].layers[name].l0 <= 4
    assert watcher.steps[6].tokens - watcher.steps[5].tokens == int(kept.sum())


def test_calibration_centres_the_first_batch(make_trainer, blocks_output, tokens, tmp_path):
    make_trainer(shuffle=False).fit()
    state = tensors_of(tmp_path / "run" / "latest")
    batch = torch.tensor(tokens["input_ids"][:8])
    for layer, name in enumerate(HOOKPOINTS):
        x = blocks_output(batch, layer)[batch > 1].double()
        torch.testing.assert_close(state[f"{name}/state/mean"].double(), x.mean(0), rtol=1e-5, atol=1e-6)
        variance = (x - x.mean(0)).square().sum() / len(x)
        torch.testing.assert_close(state[f"{name}/state/variance"], variance, rtol=1e-5, atol=0)


SPLITS = {
    "micro": {"batch_size": 8, "micro_acc_steps": 3},
    "accumulated": {"batch_size": 4, "grad_acc_steps": 2},
    "both": {"batch_size": 2, "grad_acc_steps": 4, "micro_acc_steps": 5},
}


@pytest.mark.parametrize(
    ("kind", "split"),
    [("mixed", "micro"), ("sae", "accumulated"), ("mixed", "both"), ("transcoder", "both"), ("crosscoder", "both")],
)
def test_any_split_of_the_global_batch_gives_the_same_saes(make_trainer, tmp_path, kind, split):
    options, of_sae = KINDS[kind]
    options = {**options, "sae": SaeConfig(num_latents=64, k=4, multi_topk=True, **of_sae)}
    trainer = make_trainer("reference", **options)
    reference, other = trainer.fit(), make_trainer("other", **options, **SPLITS[split]).fit()
    assert_same_tensors(tensors_of(other), tensors_of(reference), rtol=2e-4, atol=2e-5)
    for found, expected in zip(metrics_of(tmp_path / "other"), metrics_of(tmp_path / "reference"), strict=True):
        assert found["step"] == expected["step"]
        assert found["tokens"] == expected["tokens"]
        assert found["learning_rate"] == expected["learning_rate"]
        for name in trainer.plan.hookpoints:
            assert found["layers"][name]["dead"] == expected["layers"][name]["dead"]
            for key in ("fvu", "l0", "loss", "auxk_loss", "multi_topk_fvu"):
                assert found["layers"][name][key] == pytest.approx(expected["layers"][name][key], rel=1e-4), key


def test_micro_acc_steps_really_cuts_what_the_encoder_sees(make_trainer, monkeypatch):
    rows = []
    forward = Sae.forward

    def watched(self, x, *args, **kwargs):
        rows.append(x.shape[0])
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Sae, "forward", watched)
    make_trainer(micro_acc_steps=4, layers="1").fit()
    assert max(rows) <= -(-8 * CTX_LEN // 4)
    assert len(rows) == 7 * 4


@pytest.mark.parametrize("log_every", [3, 100])
def test_reporting_less_often_changes_no_result_and_averages_right(make_trainer, tmp_path, log_every):
    every, seldom = Recorder(), Recorder()
    first = make_trainer("every", reporter=every).fit()
    second = make_trainer("seldom", reporter=seldom, log_every=log_every).fit()
    assert_same_tensors(tensors_of(second), tensors_of(first))
    expected_steps = [3, 6, 7] if log_every == 3 else [7]
    assert [stats.step for stats in seldom.steps] == expected_steps
    start = 0
    for stats in seldom.steps:
        part = every.steps[start : stats.step]
        start = stats.step
        for name in HOOKPOINTS:
            mean_loss = sum(each.layers[name].loss for each in part) / len(part)
            assert stats.layers[name].loss == pytest.approx(mean_loss, rel=1e-9)
            low, high = (f(each.layers[name].fvu for each in part) for f in (min, max))
            assert low * 0.98 <= stats.layers[name].fvu <= high * 1.02
            assert stats.layers[name].dead == part[-1].layers[name].dead


def test_dead_latents_are_counted_in_tokens_and_revived(make_trainer, tmp_path):
    """Counters against a count from outside, over the whole run."""
    watcher = Recorder()
    fired_at: dict[str, list[torch.Tensor]] = {name: [] for name in HOOKPOINTS}
    trainer = make_trainer(reporter=watcher, dead_feature_threshold=100)
    forward = Sae.forward

    def watched(sae, x, *args, **kwargs):
        out = forward(sae, x, *args, **kwargs)
        name = next(n for n in HOOKPOINTS if trainer.placement.sae(n) is sae)
        fired = torch.zeros(64, dtype=torch.int64)
        fired.index_add_(0, out.indices[out.acts > 0], torch.ones(int((out.acts > 0).sum()), dtype=torch.int64))
        fired_at[name].append(fired)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sae, "forward", watched)
        trainer.fit()
    state = tensors_of(tmp_path / "run" / "latest")
    tokens = [stats.tokens for stats in watcher.steps]
    for name in HOOKPOINTS:
        steps = torch.stack(fired_at[name])
        assert torch.equal(state[f"{name}/state/fire_count"], steps.sum(0))
        since = torch.zeros(64, dtype=torch.int64)
        for step, fired in enumerate(steps):
            since += tokens[step] - (tokens[step - 1] if step else 0)
            since[fired > 0] = 0
            assert watcher.steps[step].layers[name].dead == int((since >= 100).sum())
        assert torch.equal(state[f"{name}/state/tokens_since_fired"], since)
    assert any(stats.layers[name].dead for stats in watcher.steps for name in HOOKPOINTS), "the test needs dead latents"
    assert any(stats.layers[name].auxk_loss > 0 for stats in watcher.steps for name in HOOKPOINTS)


def test_the_schedule_is_counted_in_optimizer_steps(make_trainer):
    watcher = Recorder()
    make_trainer(reporter=watcher, batch_size=2, grad_acc_steps=4, lr=0.7, lr_warmup_steps=3).fit()
    expected = [0.7 * factor for factor in (1 / 4, 2 / 4, 3 / 4, 4 / 4, 3 / 4, 2 / 4, 1 / 4)]
    assert [stats.learning_rate for stats in watcher.steps] == pytest.approx(expected)


def test_special_and_chosen_tokens_are_left_out(make_trainer, tokens):
    ids = torch.tensor(tokens["input_ids"])
    for options, kept in (
        ({}, ids > 1),
        ({"exclude_special_tokens": False}, ids >= 0),
        ({"exclude_tokens": "5,7"}, (ids > 1) & (ids != 5) & (ids != 7)),
    ):
        watcher = Recorder()
        make_trainer("-".join(["run", *options]), reporter=watcher, **options).fit()
        assert watcher.steps[-1].tokens == int(kept.sum())


@pytest.mark.parametrize("num_latents", [64, 4000], ids=["gradients are made", "gradients are left to the step"])
def test_a_step_of_which_no_token_is_left(make_trainer, tokens, num_latents):
    ids = torch.tensor(tokens["input_ids"])
    ids[16:24] = 0  # the third batch
    watcher = Recorder()
    sae, data = SaeConfig(num_latents=num_latents, k=4), Dataset.from_dict({"input_ids": ids.tolist()})
    make_trainer(sae=sae, data=data, reporter=watcher, shuffle=False).fit()
    assert watcher.steps[-1].tokens == int((ids > 1).sum())


def test_layers_do_not_influence_each_other(make_trainer, tmp_path):
    everything = tensors_of(make_trainer("all").fit())
    alone = tensors_of(make_trainer("alone", layers="1").fit())
    assert_same_tensors(alone, {name: t for name, t in everything.items() if name.startswith("layers.1/")})


def test_the_best_checkpoint_is_kept(make_trainer, tmp_path):
    watcher = Recorder()
    make_trainer(reporter=watcher, save_best=True, save_every=2, lr=1e-2).fit()
    assert watcher.saves == [2, 4, 6, 7]
    run = tmp_path / "run"

    def mean_fvu(steps):
        return sum(stats.mean_fvu for stats in steps) / len(steps)

    means = {2: watcher.steps[:2], 4: watcher.steps[2:4], 6: watcher.steps[4:6], 7: watcher.steps[6:]}
    best = min(means, key=lambda step: mean_fvu(means[step]))
    assert (run / "best").resolve().name == f"step_{best:08d}"
    assert (run / "latest").resolve().name == "step_00000007"
    assert {path.name for path in run.glob("step_*")} == {f"step_{best:08d}", "step_00000007"}


def test_keep_last(make_trainer, tmp_path):
    make_trainer(save_every=2, keep_last=2).fit()
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == ["step_00000006", "step_00000007"]
    assert not list((tmp_path / "run").glob(".*"))


def test_the_model_is_left_as_it_was(make_trainer, tiny_llama):
    before = {name: parameter.clone() for name, parameter in tiny_llama.named_parameters()}
    tiny_llama.train()
    try:
        make_trainer().fit()
        assert tiny_llama.training
    finally:
        tiny_llama.eval()
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_foreign_token_ids_are_refused(make_trainer, tokens):
    foreign = concatenate_datasets([tokens, Dataset.from_dict({"input_ids": [[64] * CTX_LEN] * 8})])
    with pytest.raises(UserError, match=r"token id 64 at token 0 of sequence 52 .*vocabulary has 64 tokens"):
        make_trainer(data=foreign, shuffle=False)


def test_activations_that_do_not_vary_are_refused(make_trainer, tiny_llama):
    constant = torch.full((16,), 0.1)
    handle = tiny_llama.model.layers[0].register_forward_hook(lambda m, a, out: constant.expand_as(out))
    try:
        with pytest.raises(UserError, match=r"layers\.0: .*do not vary"):
            make_trainer().fit()
    finally:
        handle.remove()


def test_bad_calibration_leaves_no_folder(make_trainer, tiny_llama, tmp_path):
    handle = tiny_llama.model.layers[2].register_forward_hook(lambda m, a, out: out * math.nan)
    try:
        with pytest.raises(UserError, match=r"layers\.2: NaN or Inf in the activations"):
            make_trainer().fit()
    finally:
        handle.remove()
    assert not (tmp_path / "run").exists()


def test_width_that_contradicts_the_model(make_trainer):
    with pytest.raises(UserError, match=f"d_in = 20, but the activations are {WIDTH} wide"):
        make_trainer(sae=SaeConfig(20))
