"""NaN and Inf: the step is left out; too many in a row end the run."""

import pytest
import torch

from saekit import UserError
from tests.training.conftest import Recorder
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of


class Spoiler(Recorder):
    """Has something go wrong in certain steps."""

    def __init__(self, bad_steps):
        super().__init__()
        self.bad_steps, self.now = bad_steps, 1

    def step(self, stats):
        super().step(stats)
        self.now = stats.step + 1

    def spoils(self):
        return self.now in self.bad_steps


def overflows(trainer, spoiler, llama):
    """An activation of the middle layer."""

    def hook(module, args, output):
        return output.index_fill(1, torch.tensor([3]), float("inf")) if spoiler.infos and spoiler.spoils() else output

    return llama.model.layers[1].register_forward_hook(hook)


def loses(trainer, spoiler, llama, monkeypatch):
    """The loss of one layer, of finite activations."""
    from saekit.training import unit as module

    real, calls = module.sae_losses, []

    def spoilt(*args, **kwargs):
        losses = real(*args, **kwargs)
        calls.append(None)
        if spoiler.spoils() and len(calls) % 3 == 2:  # of three layers, the second
            return type(losses)(losses.total * float("nan"), losses.mse * float("nan"), losses.auxk, losses.multi_topk)
        return losses

    monkeypatch.setattr(module, "sae_losses", spoilt)


def explodes(trainer, spoiler, parameter):
    """A single number in the gradient of one parameter."""
    place = trainer.placement.place

    def placed(*args):
        place(*args)

        def hook(gradient):
            if spoiler.spoils():
                gradient = gradient.clone()
                gradient.view(-1)[5] = float("inf")
            return gradient

        trainer.placement.sae("layers.1").get_parameter(parameter).register_hook(hook)

    trainer.placement.place = placed


@pytest.mark.parametrize("what", ["activations", "loss", "W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_bad_step_leaves_no_trace_but_its_number(make_trainer, tiny_llama, tmp_path, what, monkeypatch):
    spoiler = Spoiler({3, 4, 6})
    trainer = make_trainer(reporter=spoiler, save_every=2, keep_last=9)
    handle = None
    if what == "activations":
        handle = overflows(trainer, spoiler, tiny_llama)
    elif what == "loss":
        loses(trainer, spoiler, tiny_llama, monkeypatch)
    else:
        explodes(trainer, spoiler, what)
    try:
        last = trainer.fit()
    finally:
        if handle:
            handle.remove()
    assert [stats.skipped_steps for stats in spoiler.steps] == [0, 0, 1, 2, 2, 3, 3]
    kind = what if what in ("activations", "loss") else "gradient"
    said = [said for said in spoiler.said if said.startswith("Warning")]
    more = " and 1 more" if what == "activations" else ""  # the layer above it reads the same
    assert said == [
        f"Warning: step {step} was skipped: NaN or Inf in the {kind} of layers.1{more}" for step in (3, 4, 6)
    ]
    saved = {step: tensors_of(last.with_name(f"step_{step:08d}")) for step in (2, 4, 6, 7)}
    assert_same_tensors(saved[4], saved[2])
    assert all(tensor.isfinite().all() for tensors in saved.values() for tensor in tensors.values())
    tokens = [record["tokens"] for record in metrics_of(tmp_path / "run")]
    assert tokens[1] == tokens[2] == tokens[3] < tokens[4] == tokens[5] < tokens[6]
    skipped = metrics_of(tmp_path / "run")[2]["layers"]["layers.0"]
    assert skipped["fvu"] is None
    assert skipped["loss"] is None


def test_the_others_are_as_if_the_batch_had_not_been(make_trainer, tiny_llama, tokens):
    """A run whose step 3 is skipped equals one of the data without that step's batch, but for its schedule."""
    options = {"shuffle": False, "lr_warmup_steps": 0, "optimizer": "signum"}  # whose rate is constant
    spoiler = Spoiler({3})
    trainer = make_trainer("skipped", reporter=spoiler, **options)
    explodes(trainer, spoiler, "W_dec")
    skipped = tensors_of(trainer.fit())
    without = tokens.select([row for row in range(len(tokens)) if not 16 <= row < 24])
    assert_same_tensors(skipped, tensors_of(make_trainer("without", data=without, **options).fit()))


def test_reports_over_several_steps_leave_the_bad_ones_out(make_trainer, tmp_path):
    spoiler = Spoiler({1})  # it is told of every second step only: steps 1 and 2
    trainer = make_trainer(reporter=spoiler, log_every=2)
    explodes(trainer, spoiler, "W_dec")
    trainer.fit()
    layers = metrics_of(tmp_path / "run")[1]["layers"]
    assert all(0 < layer["fvu"] < 2 and layer["loss"] > 0 for layer in layers.values())


@pytest.mark.parametrize("max_bad_steps", [1, 3])
def test_too_many_in_a_row_end_the_run(make_trainer, tmp_path, max_bad_steps):
    spoiler = Spoiler({2, 4, 5, 6, 7} if max_bad_steps > 1 else {4})
    trainer = make_trainer(reporter=spoiler, save_every=3, max_bad_steps=max_bad_steps)
    explodes(trainer, spoiler, "b_enc")
    when = "in each of the 3 steps up to 6" if max_bad_steps > 1 else "at step 4"
    with pytest.raises(UserError, match=rf"layers\.1: NaN or Inf in the gradient {when} .*--max-bad-steps.*--lr"):
        trainer.fit()
    assert spoiler.finished == 1
    latest = tmp_path / "run" / "latest"
    assert latest.resolve().name == "step_00000003"
    assert all(tensor.isfinite().all() for tensor in tensors_of(latest).values())


def test_the_count_goes_on_after_a_resume(make_trainer, tmp_path):
    spoiler = Spoiler({2, 3, 4, 5})
    trainer = make_trainer(reporter=spoiler, save_every=3, max_bad_steps=4)
    explodes(trainer, spoiler, "b_enc")
    with pytest.raises(UserError, match="4 steps up to 5"):
        trainer.fit()
    again = Spoiler({1, 5})  # its first step is step 4, after two bad ones
    trainer = make_trainer(reporter=again, resume=True, max_bad_steps=3)
    explodes(trainer, again, "b_enc")
    with pytest.raises(UserError, match="3 steps up to 4"):
        trainer.fit()


@pytest.mark.parametrize(("bad", "when"), [({7}, "in the last step"), ({5, 6, 7}, "in each of the last 3 steps")])
def test_a_bad_last_step_is_a_failure(make_trainer, tmp_path, bad, when):
    """The last step is saved, the last good checkpoint is kept, and resuming fails in the same way."""
    spoiler = Spoiler(bad)
    trainer = make_trainer(reporter=spoiler, save_every=2, keep_last=1)
    explodes(trainer, spoiler, "b_enc")
    good = min(bad) - 1
    message = (
        rf"layers\.1: NaN or Inf in the gradient {when} \(lowest FVU: 0\.\d+ at step \d\): .*--lr .*"
        rf"step_00000007 holds the SAEs as they were after step {good}, and older checkpoints are kept$"
    )
    with pytest.raises(UserError, match=message):
        trainer.fit()
    assert spoiler.finished == 1
    assert [stats.bad_in_row for stats in spoiler.steps[good:]] == list(range(1, len(bad) + 1))
    run_dir = tmp_path / "run"
    assert (run_dir / "latest").resolve().name == "step_00000007"
    kept = {int(folder.name.removeprefix("step_")): tensors_of(folder) for folder in run_dir.glob("step_*")}
    assert sorted(kept) == [step for step in (2, 4, 6, 7) if step >= good]
    assert all(tensor.isfinite().all() for tensors in kept.values() for tensor in tensors.values())
    assert_same_tensors(kept[7], kept[good])
    with pytest.raises(UserError, match=message):
        make_trainer(resume=True, save_every=2, keep_last=1).fit()


def test_a_run_of_bad_steps_only_keeps_the_saes_as_they_began(make_trainer, tmp_path):
    spoiler = Spoiler(set(range(1, 8)))
    trainer = make_trainer(reporter=spoiler)
    explodes(trainer, spoiler, "b_enc")
    with pytest.raises(UserError, match=r"in each of the last 7 steps: .* as they were at the beginning"):
        trainer.fit()
    assert not any(stats.diverged for stats in spoiler.steps)  # there was nothing to compare


def test_a_diverging_sae_is_noticed_and_not_saved(make_trainer, tmp_path):
    with pytest.raises(
        UserError, match=r"layers\.0: NaN or Inf in the SAE's weights|layers\.0: NaN or Inf in the loss"
    ):
        make_trainer(save_every=1, lr=1e30, optimizer="signum", max_bad_steps=2).fit()
    latest = tmp_path / "run" / "latest"
    if latest.exists():
        assert all(tensor.isfinite().all() for tensor in tensors_of(latest).values())
